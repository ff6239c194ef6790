"""The offline mix of prose: its sources, their licences, and what is left out of training."""
