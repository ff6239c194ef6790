"""Kimi Delta Attention (arXiv:2510.26692): `op`, `fused` and `step` are public, `reference` has the equations."""
