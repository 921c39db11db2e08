"""As paper.py, with the KL at T = 1."""

init = "random"
kl_temperature = 1.0
kl_weight = 1.0
clone_weight = 0.2
clone_scale = "none"
clone_attn_out = "teacher"
