"""What the value of a required setting looks like, for messages."""

from __future__ import annotations

_EXAMPLES = {
    "ckpt": "ckpt=runs/one, the directory of a run",
    "out": "out=exported/one",
    "runs": "runs='outputs/*', which are the directories of runs",
    "data.paths": "data.paths='[texts/*.txt]'",
    "data.name": "data.name=roneneldan/TinyStories",
}


def is_required(option: str) -> str:
    """The message for a setting without which a command cannot begin, with an example of its value."""
    if option not in _EXAMPLES:
        return f"{option} is required: give {option}=..."
    return f"{option} is required: give {option}=..., for example {_EXAMPLES[option]}."
