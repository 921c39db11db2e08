"""Base of the study on a real teacher, in place of base.py: SmolLM2-135M to half its width, 5.0M tokens.

hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
python prepare.py --input=text.jsonl --tokenizer=models/SmolLM2-135M-Instruct --out=data/text
python tools/compress.py config/study/smollm2.py    # the start, in closed form
python tools/study.py --base=config/study/smollm2.py --seeds="(1,)" --variants="('ours', 'weights')"

It is the best known recipe: a variant changes what its name and the options behind it say.
"""

teacher = "models/SmolLM2-135M-Instruct"
student_hidden_size = 288  # half of 576; a multiple of the 9 heads
data = "data/text"  # 13M tokens of any text
seq_len = 512
global_batch_size = 32  # 16,384 tokens a step
micro_batch_size = 32
max_steps = 305
init_from = "out/study_smollm2_start"  # by tools/compress.py
calibration_tokens = 32_768
optimizer = "muon"
learning_rate = 1e-3
warmup_ratio = 0.02
lm_weight = 0.0
clone_weight = 0.05  # the terms of 30 layers add up
clone_skip = ("attn_out", "mlp_out")  # by which the start mends the stream
eval_every = 61
eval_blocks = 64
save_every = 1_000_000  # only at the end, for what tools/study.py scores
out_dir = "out/study_smollm2"
