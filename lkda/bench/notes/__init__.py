"""The notes that the project began with: their table and their lessons, measured."""
