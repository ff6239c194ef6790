"""Loss by source."""

from __future__ import annotations

import math

import pytest
import torch

from lkda.data.text_sources import TextSource
from lkda.targets import IGNORE_INDEX
from lkda.training.source_loss import SourceLoss


def test_each_target_counts_for_the_source_that_it_is_of() -> None:
    """Eight tokens, of which three are of the first source; the target of token n is token n + 1."""
    losses = SourceLoss(
        [TextSource("a", 0, 3, 12), TextSource("b", 3, 8, 5), TextSource("c", 8, 9, 1)], torch.device("cpu")
    )
    losses.update(torch.tensor([[1.0, 2.0, 10.0, 20.0]]), torch.zeros(1, 4, dtype=torch.long))
    targets = torch.tensor([[0, IGNORE_INDEX, 0, IGNORE_INDEX]])  # a target that does not count, and padding
    losses.update(torch.tensor([[30.0, 99.0, 40.0, 99.0]]), targets)
    found = losses.compute()
    assert found == {
        "a": {"loss": 1.5, "bits_per_byte": pytest.approx(1.5 / math.log(2) / 4), "tokens": 2},
        "b": {"loss": 25.0, "bits_per_byte": pytest.approx(25 / math.log(2)), "tokens": 4},
    }
