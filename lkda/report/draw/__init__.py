"""What all plots and pages use: colours, labels, units, curves and tables."""
