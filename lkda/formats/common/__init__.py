"""Code that several formats use."""
