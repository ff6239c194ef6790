"""Simplified linear attention: an elementwise gated recurrence with two numbers a channel."""
