"""Simplified linear attention: an elementwise gated recurrence with two numbers per channel."""
