"""Base of the longer study, in place of base.py: SmolLM2-135M to half its width, 51,200 tokens.

hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
python prepare.py --tokenizer=models/SmolLM2-135M-Instruct --out=data/stdlib_smollm2
python tools/study.py --base=config/study/smollm2.py --seeds="(1,)" \\
    --variants="('paper --kl_weight=0.32', 'rate_3e_4')"    # seq_len over the paper's T²
"""

teacher = "models/SmolLM2-135M-Instruct"
student_hidden_size = 288  # half of 576; a multiple of the 9 heads
data = "data/stdlib_smollm2"
seq_len = 512
global_batch_size = 2
micro_batch_size = 2
max_steps = 50
learning_rate = 1e-3
warmup_ratio = 0.1  # 5 steps; with 2 pca loses its start
clone_weight = 0.05  # the terms of 30 layers add up
eval_every = 5
eval_blocks = 8
save_every = 1_000_000  # only at the end, for what tools/study.py scores
out_dir = "out/study_smollm2"
