"""Short causal convolutions with SiLU and the L2 norm per head: `op` is public, `reference` is the definition."""
