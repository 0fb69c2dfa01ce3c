"""Hugging Face checkpoints to the exported folder: one file a model family."""
