"""The corpus of data=prose: its sources, their licences, and the removal of held-out text from training."""
