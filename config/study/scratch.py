"""The student's shape as a plain LM, from random weights, without a teacher."""

import json
import pathlib

tokenizer = teacher  # noqa: F821 (what the configs before it have set)
_config = json.loads(pathlib.Path(tokenizer, "config.json").read_text())
model_config = {
    **_config,
    "head_dim": _config.get("head_dim") or _config["hidden_size"] // _config["num_attention_heads"],
    "hidden_size": student_hidden_size,  # noqa: F821
    "rms_norm_eps": student_rms_norm_eps,  # noqa: F821
}
teacher = None
