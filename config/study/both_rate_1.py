"""As both.py, the free part at the rate of the projections."""

train = "both"
