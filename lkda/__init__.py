"""lkda: small language models in which the sequence mixer is the variable.

    model, tokenizer = lkda.load("exported_directory")
    lkda.export(model, tokenizer, "another_directory")

`import lkda` and `lkda.ops` need torch alone; the rest is imported by the function that uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lkda.models.lm import LanguageModel

__version__ = "0.1.0"


def load(directory: str | Path, *, backend: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """Load an exported directory: (model, tokenizer), the model on the CPU and in eval mode.

    Raises ValueError where the directory is incomplete, broken or of another kind.
    """
    from lkda.formats import load

    return load(directory, backend=backend)


def export(model: LanguageModel, tokenizer: Tokenizer, out: str | Path, *, format: str = "lkda") -> None:
    """Write `model` and `tokenizer` into the new or empty directory `out`.

    Raises ValueError for an unknown format, an occupied directory, or a model that the format cannot express.
    """
    from lkda.formats import save

    save(out, model, tokenizer, format=format)
