"""Kimi Delta Attention (arXiv:2510.26692): `op` is public, `recurrent` the equations, `chunk` the chunked form."""
