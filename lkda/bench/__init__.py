"""Timing of the operators against their floor, their peers and float64; the resources their kernels take."""
