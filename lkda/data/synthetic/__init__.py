"""Synthetic tasks, sampled on the fly."""
