"""As both.py, the free part at 0.1 of the rate."""

train = "both"
free_learning_rate = 0.1 * learning_rate  # noqa: F821
