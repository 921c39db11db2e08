"""The quickstart's student without its teacher: the same shape, data, tokens and script, from scratch.

python train.py config/quickstart_scratch.py
"""

teacher = None
model_config = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 96,
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
out_dir = "out/quickstart_scratch"
