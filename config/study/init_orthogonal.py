"""Ours from random orthogonal projections."""

init = "orthogonal"
