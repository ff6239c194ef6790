"""KDA in PyTorch: the recurrence as it is written, and its chunked form."""
