"""Training: the LightningModule, its optimizer, and the callbacks that record a run in its run directory."""
