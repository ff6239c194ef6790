"""Softmax attention: of sequences, through PyTorch's fused implementation; and of one token, in kernels for decoding."""
