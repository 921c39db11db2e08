"""Ours at a third of the learning rate."""

learning_rate = 1e-3
