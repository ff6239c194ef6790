"""KDA in PyTorch: the recurrence as its equation stands, its chunked form, and the gates of a layer."""
