"""Ours at a learning rate that is low enough for SmolLM2-135M."""

learning_rate = 3e-4
