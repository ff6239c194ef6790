"""Measurements with a command of their own, `python -m lkda.commands.studies.NAME`, which train or prepare data."""
