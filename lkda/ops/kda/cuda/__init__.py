"""KDA's kernels, and what launches them."""
