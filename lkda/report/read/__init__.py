"""Reads the files of runs and measurements."""
