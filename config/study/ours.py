"""Ours: train.py's defaults, with nothing changed."""
