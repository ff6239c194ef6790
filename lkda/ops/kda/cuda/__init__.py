"""The KDA kernels and the code that launches them."""
