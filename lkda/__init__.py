"""lkda: small language models in which the sequence mixer is the variable.

    model, tokenizer = lkda.load("exported_directory")
    print(lkda.generate(model, tokenizer, "Fellow citizens", max_new_tokens=50).texts[0])
    lkda.export(model, tokenizer, "another_directory", format="hf")

`import lkda` and `lkda.ops` need only torch. Every other dependency is imported by the function that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lkda.generation import Session, generate, stream
    from lkda.models.lm import LanguageModel

__all__ = ["Session", "export", "generate", "load", "stream"]
__version__ = "0.1.0"


def load(directory: str | Path, *, backend: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """Load an exported directory, or a transformers directory (Kimi Linear, Llama). Returns (model, tokenizer).

    The model is in float32, on the CPU and in eval mode. No code in the directory is executed.

    Raises: InputError (a ValueError) if the directory is incomplete or broken, or holds a model of an unsupported kind.
    """
    from lkda.formats import load

    return load(directory, backend=backend)


def export(
    model: LanguageModel,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    format: str = "lkda",
    dtype: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write `model`, `tokenizer` and a model card into the new or empty directory `out`.

    Args:
        format: lkda, hf (transformers, and programs that read its format), gguf (llama.cpp) or fla
            (flash-linear-attention).
        dtype: data type of the weights: float32 or bfloat16; for gguf f32, f16 or q8_0. None means the first of these.
        run: what the model card says about the training, {"training": {name: value}, "results": {...}, "config": dict}.
    Raises: InputError (a ValueError) for an unknown format or dtype, a directory that is not empty, or a model that the
        format cannot express. The message names the formats that can.
    """
    from lkda.formats import save

    save(out, model, tokenizer, format=format, dtype=dtype, run=run)


def __getattr__(name: str) -> Any:
    """`generate`, `stream` and `Session` are imported when they are used: they need more than torch."""
    if name in _GENERATION:
        import lkda.generation

        return getattr(lkda.generation, name)
    raise AttributeError(f"module 'lkda' has no attribute {name!r}")


_GENERATION = ("Session", "generate", "stream")
