"""On top of a benchmark's config: the student's shape alone, trained as an ordinary language model.

python tools/bench.py config/bench_smollm2.py config/bench_ordinary.py
"""

model_config = {**teacher, "hidden_size": student_hidden_size}  # noqa: F821
model_config.setdefault("head_dim", teacher["hidden_size"] // teacher["num_attention_heads"])  # noqa: F821
teacher = None
