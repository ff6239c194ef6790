"""The file in which a failed job of a sweep says why it failed."""

FAILURE = "failure.txt"
