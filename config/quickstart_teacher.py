"""The bundled teacher of the quickstart: a 3.1M-parameter Llama on the Python standard library's source.

    python train.py config/quickstart_teacher.py
    python convert.py --checkpoint=out/quickstart_teacher --out=student --dtype=bfloat16

What convert.py wrote is data/quickstart/teacher; its loss is in config/study/README.md.
"""

teacher = None
model_config = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
}
tokenizer = "data/quickstart/teacher"
data = "data/quickstart/corpus"
seq_len = 256
global_batch_size = 16
micro_batch_size = 16
max_steps = 3200  # 13.1M tokens, 3.8 epochs
learning_rate = 3e-3
lr_schedule = "cosine"
warmup_ratio = 0.03
beta2 = 0.95
weight_decay = 0.1
out_dir = "out/quickstart_teacher"
save_every = 200
eval_every = 500
