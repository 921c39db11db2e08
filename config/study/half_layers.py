"""Ours with half of the teacher's layers, the first and the last among them."""

import json
import pathlib

_config = json.loads(pathlib.Path(teacher, "config.json").read_text())  # noqa: F821
student_layers = _config["num_hidden_layers"] // 2
