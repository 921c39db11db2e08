"""LRC-1.5B of the paper (arXiv 2505.12781): Llama-3.2-3B-Instruct to half its width on 10.2B tokens.

hf download meta-llama/Llama-3.2-3B-Instruct --local-dir models/Llama-3.2-3B-Instruct
torchrun --nproc_per_node=8 train.py config/lrc_1_5b.py
"""

teacher = "models/Llama-3.2-3B-Instruct"
student_hidden_size = 1536  # d_T is 3072
data = {"data/fineweb_edu": 10e9, "data/openhermes": None}  # Mixed-1.1
seq_len = 2048  # packed
global_batch_size = 24  # 49,152 tokens a step
micro_batch_size = 3  # 8 GPUs without accumulation
max_steps = 208_000  # 10.2B tokens
learning_rate = 1e-4
lr_schedule = "linear"  # to 0
warmup_ratio = 0.005
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
max_grad_norm = 1.0
init = "random"  # N(0, 0.02)
lm_weight = 1.0
kl_temperature = 40.0
kl_weight = 2048 / 40**2  # the authors' KL is summed over the sequence and has no T²
clone_weight = 0.2  # alpha
clone_scale = "none"
clone_attn_out = "teacher"  # as the authors' code computes it; the paper's formula is "student"
out_dir = "out/lrc_1_5b"
log_every = 10
eval_every = 2000
save_every = 2000
