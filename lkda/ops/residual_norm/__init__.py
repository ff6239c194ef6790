"""The sum of the residual stream with a layer's output, and the RMSNorm of the sum, in one launch."""
