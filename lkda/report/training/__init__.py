"""Runs of training, side by side."""
