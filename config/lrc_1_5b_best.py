"""LRC-1.5B with what small runs found best (see config/study/README.md), in place of the paper's settings.

    python tools/compress.py config/lrc_1_5b_best.py          # the start, in closed form
    torchrun --nproc_per_node=8 train.py config/lrc_1_5b_best.py

On SmolLM2 projections by Muon end lowest: 3.734 at 2.5M tokens, --train=weights 3.772, AdamW 3.945.
At this rate AdamW's first steps undo the start in closed form there; Muon's do not.
Not yet run at this scale: the study is on teachers of 3M and 135M parameters.
"""

teacher = "models/Llama-3.2-3B-Instruct"
student_hidden_size = 1536  # d_T is 3072
data = {"data/fineweb_edu": 10e9, "data/openhermes": None}  # Mixed-1.1
seq_len = 2048
global_batch_size = 24  # 49,152 tokens a step
micro_batch_size = 3  # 8 GPUs without accumulation
max_steps = 208_000  # 10.2B tokens
optimizer = "muon"
learning_rate = 3e-4
lr_schedule = "linear"
warmup_ratio = 0.005
init_from = "out/lrc_1_5b_best_start"  # by tools/compress.py, the best start of a real teacher
calibration_tokens = 65_536
lm_weight = 0.0  # the KL alone: in small runs a lower held-out loss of text too
kl_temperature = 1.0
kl_weight = 1.0
clone_scale = "teacher"
clone_weight = 0.05  # the terms of 28 layers add up
clone_skip = ("attn_out", "mlp_out")  # the start lets these mend the stream's errors, not match the teacher's
out_dir = "out/lrc_1_5b_best"
log_every = 10
eval_every = 2000
save_every = 2000
