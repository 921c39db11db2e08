"""The student's own weights, started from what the projections compose."""

train = "weights"
