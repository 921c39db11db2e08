"""SmolLM2-135M-Instruct to half its width, on a laptop: a million tokens by Muon.

hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
python prepare.py --tokenizer=models/SmolLM2-135M-Instruct --out=data/stdlib_smollm2
python tools/compress.py config/smollm2_135m.py    # the start, in closed form
python train.py config/smollm2_135m.py
"""

teacher = "models/SmolLM2-135M-Instruct"
student_hidden_size = 288  # half of 576; a multiple of the 9 heads
data = "data/stdlib_smollm2"  # any shards of prepare.py
seq_len = 512
global_batch_size = 2
micro_batch_size = 2
max_steps = 1000  # 1.0M tokens
init_from = "out/smollm2_135m_start"  # by tools/compress.py; pca starts worse than a guess
calibration_tokens = 32_768
optimizer = "muon"  # config/study/README.md has its rows, and those of what follows
learning_rate = 3e-4  # at 1e-3 98 such steps end 0.07 higher
lm_weight = 0.1  # a lower loss than the KL alone, at an equal KL
clone_weight = 0.05  # the terms of 30 layers add up
clone_skip = ("attn_out", "mlp_out")  # by which the start mends the stream
warmup_ratio = 0.02
eval_every = 250
eval_blocks = 32
save_every = 250
sample_prompt = "def main("  # the data are Python source
out_dir = "out/smollm2_135m"
