"""Loss by position in the context."""

import pytest
import torch

from lkda.training.positions import PositionLoss, columns, starts


def test_ranges_double_and_cover_the_context():
    assert starts(1) == [0]
    assert starts(6) == [0, 1, 2, 4]
    assert columns(8) == ["val/loss/from_0", "val/loss/from_1", "val/loss/from_2", "val/loss/from_4"]


def test_means_over_batches_leave_out_what_is_not_asked():
    measured = PositionLoss(6)
    losses = torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0, 9.0]])
    measured.update(losses, torch.tensor([[1, 1, 1, -100, 1, 1]]), None)
    measured.update(10 * losses, torch.ones(1, 6, dtype=torch.long), None)
    found = {name: value.item() for name, value in measured.compute().items()}
    assert found == pytest.approx(
        {"val/loss/from_0": 5.5, "val/loss/from_1": 11, "val/loss/from_2": 83 / 3, "val/loss/from_4": 44}
    )
    assert measured.compute() == {}


def test_positions_of_packed_sequences_count_from_their_start():
    measured = PositionLoss(4)
    losses, bounds = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), torch.tensor([0, 0, 2, 5])
    measured.update(losses, torch.ones(1, 5, dtype=torch.long), bounds)
    assert measured.compute() == {"val/loss/from_0": 2.5, "val/loss/from_1": 5, "val/loss/from_2": 16}
