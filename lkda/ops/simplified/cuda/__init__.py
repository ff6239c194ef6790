"""The kernels of simplified linear attention, and what launches them."""
