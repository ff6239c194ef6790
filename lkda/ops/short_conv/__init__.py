"""Short causal convolutions with SiLU, and the L2 norm of heads behind them: `op` is public, `plain` the definition."""
