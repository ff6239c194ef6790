"""Files of runs and measurements -> records."""
