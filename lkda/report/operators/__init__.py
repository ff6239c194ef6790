"""Operators' times and errors."""
