"""Random projections trained by CE and KL alone: as near as train.py gets to "from scratch + KL"."""

init = "random"
clone_weight = 0.0
