"""Compiling, caching, choosing and launching kernels."""
