"""Base of the token-efficiency study: the quickstart, 204,800 tokens, evaluated every 10,240.

    python tools/study.py         # all variants and seeds, and their table
    python train.py config/study/base.py --init=random --seed=1 --out_dir=out/study/init_random_1

variants.py has the variants; each changes only what its name says.
"""

global_batch_size = 8
micro_batch_size = 8
max_steps = 100
learning_rate = 3e-3
lm_weight = 1.0  # as when these rows were run; train.py has 0.1 now,
clone_weight = 0.2  # and 0.05
eval_every = 5
eval_blocks = 32
save_every = 1_000_000  # only at the end, for what tools/study.py scores
out_dir = "out/study"
