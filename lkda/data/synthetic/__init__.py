"""Synthetic tasks, drawn on the fly."""
