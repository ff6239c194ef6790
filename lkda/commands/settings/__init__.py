"""From the configuration that Hydra composed to checked values; where the configurations are."""
