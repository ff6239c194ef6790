"""A run of `lkda.commands.train`: its plan, its processes, its directory, its training, its summary and its console."""
