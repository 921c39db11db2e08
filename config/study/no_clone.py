"""Ours without any clone loss: CE and KL train the projections."""

clone_weight = 0.0
