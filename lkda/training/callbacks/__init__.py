"""Lightning callbacks, one purpose per file."""

from lkda.training.callbacks.checkpoints import Checkpoints
from lkda.training.callbacks.divergence import DivergedError, DivergenceGuard
from lkda.training.callbacks.hang import HangGuard
from lkda.training.callbacks.interruption import InterruptedRunError, StopRequest
from lkda.training.callbacks.learnt import LearntRun, StopWhenLearnt
from lkda.training.callbacks.overview import ModelOverview
from lkda.training.callbacks.progress import TrainingProgress
from lkda.training.callbacks.recorder import Recorder

__all__ = [
    "Checkpoints",
    "DivergedError",
    "DivergenceGuard",
    "HangGuard",
    "InterruptedRunError",
    "LearntRun",
    "ModelOverview",
    "Recorder",
    "StopRequest",
    "StopWhenLearnt",
    "TrainingProgress",
]
