"""Sampling a token from logits, with random numbers that a counter determines: `op` is public, `reference` is the
definition."""
