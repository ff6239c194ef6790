"""Language models in which the sequence mixer is the variable."""

from lkda.models.build import build_model
from lkda.models.generate import generate
from lkda.models.lm import LanguageModel

__all__ = ["LanguageModel", "build_model", "generate"]
