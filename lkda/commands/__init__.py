"""What the scripts do, one function each: from a composed configuration to files and a result."""
