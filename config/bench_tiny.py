"""A benchmark of the training step at shape T of tools/README.md: a small teacher, to half its width.

    python tools/bench.py config/bench_tiny.py

Random tokens and a random teacher: no downloads. Ends with one line of JSON.
"""

teacher = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
student_hidden_size = 128
data = None  # random tokens
seq_len = 256
global_batch_size = 8
micro_batch_size = 8
max_steps = 30
compile = True  # the first step compiles, and is reported apart
