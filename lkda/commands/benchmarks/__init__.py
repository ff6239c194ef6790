"""The tasks of `lkda.commands.benchmark` that measure whole models, and task=all, the whole set."""
