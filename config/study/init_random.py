"""Ours from random projections, N(0, 0.02)."""

init = "random"
