"""What is said about a checkpoint of a run that cannot be read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lkda.checks import InputError
from lkda.commands.run.checkpoint_loading import load_trained


def test_a_damaged_checkpoint_of_a_run_names_another_one(tmp_path: Path) -> None:
    """The last and the best checkpoint are that of a step."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    damaged = checkpoints / "step_0000006.ckpt"
    damaged.write_bytes(b"PK")
    for name in ("last", "best"):
        os.link(damaged, checkpoints / f"{name}.ckpt")
    for given in (tmp_path / "run", checkpoints / "best.ckpt"):
        with pytest.raises(InputError, match=r"train the run again: there is no other checkpoint in .*/checkpoints\.$"):
            load_trained(given)
    shutil.copy(damaged, checkpoints / "step_0000003.ckpt")
    for given in (tmp_path / "run", damaged):
        with pytest.raises(
            InputError, match=r"damaged, give another checkpoint of the run: ckpt=.*/step_0000003\.ckpt$"
        ):
            load_trained(given)
