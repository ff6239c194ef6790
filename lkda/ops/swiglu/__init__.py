"""SwiGLU of the two halves of one product, in one launch."""
