"""A benchmark of the training step at shape S of tools/README.md: SmolLM2-135M's, to half its width.

    python tools/bench.py config/bench_smollm2.py

Random tokens and a random teacher: no downloads. Ends with one line of JSON.
"""

teacher = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
student_hidden_size = 288
data = None  # random tokens
seq_len = 512
global_batch_size = 2
micro_batch_size = 2
max_steps = 12
compile = True  # the first step compiles, and is reported apart
