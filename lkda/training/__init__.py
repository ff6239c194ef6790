"""Training: the LightningModule, its optimiser, and the callbacks that make a run directory the record of a run."""
