"""Benchmarks of the operators: their time beside a memory lower bound and other libraries, their error against float64,
and the resources that their kernels use."""
