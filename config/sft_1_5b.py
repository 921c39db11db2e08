"""Supervised fine-tuning of an exported student on UltraChat 200k, as the paper does after the clone.

    python prepare.py --input='raw/ultrachat/data/train_sft-*.parquet' --sft=True --heldout_fraction=0.005 \\
        --tokenizer=student --out=data/ultrachat
    torchrun --nproc_per_node=8 train.py config/sft_1_5b.py --init_from=student

The result is in out/sft_1_5b, a Hugging Face directory in each checkpoint.
"""

teacher = None
init_from = "student"
data = "data/ultrachat"
sft = True
seq_len = 2048  # longest row
global_batch_size = 64  # rows; the paper does not give its number
micro_batch_size = 8
max_steps = 0
epochs = 1.0
learning_rate = 1e-5
lr_schedule = "cosine"
warmup_ratio = 0.1
weight_decay = 0.0
out_dir = "out/sft_1_5b"
save_every = 500
eval_every = 500
eval_blocks = 256
