"""Softmax attention: of sequences, through PyTorch's fused implementation; of one token, in kernels for decoding."""
