"""As half_layers.py, with free weights beside the projections."""

import json
import pathlib

_config = json.loads(pathlib.Path(teacher, "config.json").read_text())  # noqa: F821
student_layers = _config["num_hidden_layers"] // 2
train = "both"
free_learning_rate = 0.3 * learning_rate  # noqa: F821
