"""Reports of single studies."""
