"""Ours without the KL to the teacher's predictions."""

kl_weight = 0.0
