"""Synthetic tasks, whose examples are sampled during training."""
