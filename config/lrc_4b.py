"""LRC-4B of the paper (arXiv 2505.12781): Qwen2.5-7B-Instruct to 2048 of its 3584 channels on 18B tokens.

hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct
torchrun --nproc_per_node=8 train.py config/lrc_4b.py --parallel=fsdp
"""

teacher = "models/Qwen2.5-7B-Instruct"
student_hidden_size = 2048  # d_T is 3584
data = {"data/fineweb_edu": 18e9, "data/openhermes": None}  # Mixed-1.1
seq_len = 2048  # packed
global_batch_size = 16  # 32,768 tokens a step
micro_batch_size = 2  # 8 GPUs without accumulation
max_steps = 550_000  # 18B tokens
learning_rate = 1e-4
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
out_dir = "out/lrc_4b"
log_every = 10
eval_every = 2000
save_every = 2000
