"""The variants of the study: {name: options of train.py on top of a base config}, by base.py's sizes.

tools/study.py runs any of them by its name, and prints the command that it runs.
"""

import pathlib
import runpy

_SCRATCH = runpy.run_path(pathlib.Path(__file__).parents[1] / "quickstart_scratch.py")

# As the authors' code runs it (arXiv 2505.12781).
_PAPER = {
    "init": "random",  # N(0, 0.02)
    "kl_temperature": 40.0,
    "kl_weight": 256 / 40**2,  # their KL is summed over the sequence, seq_len, and has no T²
    "clone_weight": 0.2,  # alpha
    "clone_scale": "none",
    "clone_attn_out": "teacher",  # as their code computes it; the paper's formula is "student"
    # Of a base that has more than train.py's defaults:
    "init_from": None,
    "optimizer": "adamw",
    "lm_weight": 1.0,
    "clone_skip": (),
}

VARIANTS = {
    # The student's shape as a plain LM, from random weights, without a teacher.
    "scratch": {
        "teacher": None,
        "tokenizer": _SCRATCH["tokenizer"],
        "model_config": _SCRATCH["model_config"],
    },
    # The same for smollm2.py.
    "scratch_288": {
        "teacher": None,
        "init_from": None,
        "optimizer": "adamw",
        "lm_weight": 1.0,
        "tokenizer": "models/SmolLM2-135M-Instruct",
        "model_config": {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 288,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    },
    "paper": _PAPER,
    "init_random": {"init": "random", "init_from": None},
    "init_pca": {"init": "pca", "init_from": None},
    "scale_none": {"clone_scale": "none"},
    "temperature_40": {"kl_temperature": 40.0, "kl_weight": 1.0},  # times T², as at T = 1
    "no_clone": {"clone_weight": 0.0},
    "no_ffn": {"clone_skip": ("gate", "up", "mlp_out")},
    "no_attention": {"clone_skip": ("q", "k", "v", "attn_out")},
    "no_ce": {"lm_weight": 0.0},
    "no_kl": {"kl_weight": 0.0},
    "rate_1e_3": {"learning_rate": 1e-3},
    # train.py's defaults, with nothing changed.
    "ours": {},
    # The student's own weights, started from what the projections compose.
    "weights": {"train": "weights"},
    # What was best at 204,800 tokens: Muon, the KL alone, and four times as many, smaller steps.
    "best": {
        "optimizer": "muon",
        "lm_weight": 0.0,
        "learning_rate": 1.5e-3,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "max_steps": 400,
        "eval_every": 20,
    },
}
