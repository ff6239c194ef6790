"""Loads an exported model and continues a text. These commands train a model, export it, and run the example:

python scripts/train.py hydra.run.dir=runs/one trainer.max_steps=200
python scripts/export.py ckpt=runs/one out=exported/one
python examples/generate.py exported/one "The people of the United States"
"""

from __future__ import annotations

import sys

import lkda
from lkda.checks import InputError


def main(directory: str = "exported/one", prompt: str = "The people of the United States") -> str:
    """Prints the prompt with its continuation, and returns this text."""
    model, tokenizer = lkda.load(directory)
    found = lkda.generate(model, tokenizer, prompt, max_new_tokens=50, temperature=0.8, top_p=0.95, seed=1)
    text = prompt + found.texts[0]
    print(text)
    return text


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InputError as error:  # such as a directory without a model; it says what to give instead
        sys.exit(f"error: {error}")
