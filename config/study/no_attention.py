"""Ours without attention's clone terms."""

clone_skip = ("q", "k", "v", "attn_out")
