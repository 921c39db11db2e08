"""What was best at 204,800 tokens: free weights beside the projections, Muon, the KL alone, and four times as
many, smaller steps."""

train = "both"
lm_weight = 0.0
optimizer = "muon"
learning_rate = 1.5e-3
free_learning_rate = learning_rate / 3
global_batch_size = max(1, global_batch_size // 4)  # noqa: F821
micro_batch_size = global_batch_size
max_steps = 4 * max_steps  # noqa: F821
eval_every = 4 * eval_every  # noqa: F821
