"""Sums over rows in a fixed order: the second pass of every gradient that all tokens share."""
