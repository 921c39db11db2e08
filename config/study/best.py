"""What was best at 204,800 tokens: the start in closed form, Muon, and four times as many, smaller steps."""

init = "least_squares"
calibration_tokens = 32_768
optimizer = "muon"
learning_rate = 1.5e-3
global_batch_size = global_batch_size // 4  # noqa: F821
micro_batch_size = global_batch_size
max_steps = 4 * max_steps  # noqa: F821
eval_every = 4 * eval_every  # noqa: F821
