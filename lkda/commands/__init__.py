"""The commands: one function each, which takes a composed configuration, writes files and returns a result."""
