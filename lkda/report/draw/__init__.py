"""What all pictures and pages share: colours, labels, units, curves, tables."""
