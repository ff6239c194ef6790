"""The layers of a decoding step on a CPU: embedding, norms and matrix products of a few rows."""
