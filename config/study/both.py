"""Projections and a free part of every weight, which starts at zero and trains at 0.3 of the rate."""

train = "both"
free_learning_rate = 0.3 * learning_rate  # noqa: F821
