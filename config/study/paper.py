"""Low-Rank Clone as the authors' code runs it (arXiv 2505.12781): random projections, T = 40, plain MSE."""

init = "random"  # N(0, 0.02)
kl_temperature = 40.0
kl_weight = seq_len / 40**2  # noqa: F821 (the authors' KL is summed over the sequence and has no T²)
clone_weight = 0.2  # alpha
clone_scale = "none"
clone_attn_out = "teacher"  # as the authors' code computes it; the paper's formula is "student"
