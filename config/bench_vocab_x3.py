"""On top of another benchmark: three times its vocabulary.

python tools/bench.py config/bench_smollm2.py config/bench_vocab_x3.py
"""

teacher = teacher | {"vocab_size": 3 * teacher["vocab_size"]}  # noqa: F821 (what the configs before it have set)
