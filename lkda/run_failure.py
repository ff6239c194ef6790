"""The file in which a failed job of a sweep says why it failed."""

from lkda.checks import InputError

FAILURE = "failure.txt"


class OtherRunError(InputError):
    """The run directory holds a run that this one would change. It has not failed, and stays as it is."""
