"""The softmax kernels and the code that launches them."""
