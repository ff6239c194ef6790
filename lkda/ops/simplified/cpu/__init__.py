"""Simplified linear attention on a CPU, in C++."""
