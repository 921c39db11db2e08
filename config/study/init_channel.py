"""Ours from the channels with most energy, as arXiv 2605.29327 starts."""

init = "channel"
