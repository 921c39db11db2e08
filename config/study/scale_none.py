"""Ours with clone terms as plain mean squared errors."""

clone_scale = "none"
