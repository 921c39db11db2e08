"""LRC-1.7B of the paper (arXiv 2505.12781): Qwen2.5-3B-Instruct to 1200 of its 2048 channels on 20B tokens.

hf download Qwen/Qwen2.5-3B-Instruct --local-dir models/Qwen2.5-3B-Instruct
torchrun --nproc_per_node=8 train.py config/lrc_1_7b.py
"""

teacher = "models/Qwen2.5-3B-Instruct"
student_hidden_size = 1200  # d_T is 2048
data = {"data/fineweb_edu": 20e9, "data/openhermes": None}  # Mixed-1.1
seq_len = 2048  # packed
global_batch_size = 16  # 32,768 tokens a step
micro_batch_size = 2  # 8 GPUs without accumulation
max_steps = 610_000  # 20B tokens
learning_rate = 6.7e-5
lr_schedule = "linear"  # to 0
warmup_ratio = 0.005
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
max_grad_norm = 1.0
init = "random"  # N(0, 0.02)
lm_weight = 1.0
kl_temperature = 40.0
kl_weight = 2048 / 40**2  # the authors' KL is summed over the sequence and has no T²
clone_weight = 0.5  # alpha
clone_scale = "none"
clone_attn_out = "teacher"  # as the authors' code computes it; the paper's formula is "student"
out_dir = "out/lrc_1_7b"
log_every = 10
eval_every = 2000
save_every = 2000
