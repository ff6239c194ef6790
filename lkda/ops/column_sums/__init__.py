"""Sums over rows in a fixed order: the second pass of the gradients of weights, which are sums over all tokens."""
