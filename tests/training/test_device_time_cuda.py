"""What the host learns of a GPU without stopping it."""

from __future__ import annotations

import pytest
import torch

from lkda.training.device_time import ComingValues, Moment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_moments_and_values_of_a_gpu() -> None:
    device = torch.device("cuda")
    x, three = torch.randn(8192, 8192, device=device), torch.tensor(3, device=device)
    ComingValues([(x @ x).isfinite().all(), three]).read()  # the first use loads libraries and pins memory, which waits
    torch.cuda.synchronize()
    before = Moment(device)
    for _ in range(20):
        x = x @ x / 8192
    coming = ComingValues([x.isfinite().all(), three])
    assert not coming.have_arrived()  # 20 products take milliseconds, and the host is here before
    assert coming.read() == [1.0, 3.0]
    assert coming.have_arrived()
    assert 1e-3 < coming.moment.seconds_since(before) < 60
