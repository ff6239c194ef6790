"""Text -> tokens -> packed batches: from files, from the hub, from token files."""
