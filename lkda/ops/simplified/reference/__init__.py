"""Simplified linear attention in PyTorch: the recurrence, and its chunked form."""
