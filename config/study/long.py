"""Base of the study of free weights, in place of base.py: 614,400 tokens, evaluated every 30,720.

python tools/study.py --base=config/study/long.py --variants="('ours', 'weights')"
"""

global_batch_size = 8
micro_batch_size = 8
max_steps = 300
learning_rate = 3e-3
lm_weight = 1.0  # as when these rows were run; train.py has 0.1 now,
clone_weight = 0.2  # and 0.05
eval_every = 15
eval_blocks = 32
save_every = 1_000_000  # only at the end, for what tools/study.py scores
out_dir = "out/study_long"
