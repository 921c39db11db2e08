"""Ours without the FFN's clone terms."""

clone_skip = ("gate", "up", "mlp_out")
