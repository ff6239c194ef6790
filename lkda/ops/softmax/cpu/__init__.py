"""Softmax attention of one token to a preallocated cache, on a CPU, in C++."""
