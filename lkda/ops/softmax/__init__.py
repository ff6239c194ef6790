"""Softmax attention, through PyTorch's fused implementation."""
