"""As half_ffn.py, with free weights beside the projections."""

import json
import pathlib

_config = json.loads(pathlib.Path(teacher, "config.json").read_text())  # noqa: F821
student_intermediate_size = _config["intermediate_size"] // 2
train = "both"
free_learning_rate = 0.3 * learning_rate  # noqa: F821
