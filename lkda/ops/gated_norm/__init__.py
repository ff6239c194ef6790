"""RMSNorm of each head's output, gated: `op` is public, `plain` the definition."""
