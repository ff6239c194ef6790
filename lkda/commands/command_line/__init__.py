"""What the user types and what a command answers: overrides, texts, errors of one line, commands to type next."""
