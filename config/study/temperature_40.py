"""Ours with the KL at T = 40, times T² as at T = 1."""

kl_temperature = 40.0
kl_weight = 1.0
