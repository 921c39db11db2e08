"""Ours without the next-token loss."""

lm_weight = 0.0
