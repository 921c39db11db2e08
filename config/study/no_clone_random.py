"""Random projections trained by CE and KL alone: near to "from scratch + KL"."""

init = "random"
clone_weight = 0.0
