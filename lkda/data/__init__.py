"""Data modules: packed batches of text tokens, and batches of synthetic tasks."""
