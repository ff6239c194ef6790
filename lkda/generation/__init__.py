"""Text from a model and its tokenizer: for one or many prompts, and in sessions that keep their state."""

from lkda.generation.generate import Generated, Generations, Piece, generate, stream
from lkda.generation.session import Session

__all__ = ["Generated", "Generations", "Piece", "Session", "generate", "stream"]
