"""The kernels of simplified linear attention and the code that launches them."""
