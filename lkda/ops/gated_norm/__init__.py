"""RMSNorm of each head's output, with a gate: `op` holds the public function, `reference` the definition."""
