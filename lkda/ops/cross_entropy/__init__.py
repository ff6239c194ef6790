"""The loss of a language model's head, without all of its logits at once."""
