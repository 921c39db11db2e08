"""Ours with half of the teacher's FFN neurons, those that add most."""

import json
import pathlib

_config = json.loads(pathlib.Path(teacher, "config.json").read_text())  # noqa: F821
student_intermediate_size = _config["intermediate_size"] // 2
