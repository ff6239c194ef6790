"""The number of threads with which PyTorch computes on the CPU while a GPU trains."""

import pytest
import torch

from lkda.device import device_name, one_cpu_thread


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _inside(device: str) -> int:
    with one_cpu_thread(torch.device(device)):
        return torch.get_num_threads()


def test_beside_a_gpu_one_thread_prepares_batches(three_threads):
    assert _inside("cuda") == 1
    assert torch.get_num_threads() == 3


def test_the_threads_come_back_after_an_error(three_threads):
    with pytest.raises(RuntimeError), one_cpu_thread(torch.device("cuda")):
        raise RuntimeError
    assert torch.get_num_threads() == 3


def test_training_on_a_cpu_keeps_its_threads(three_threads):
    assert _inside("cpu") == 3


def test_a_number_that_the_user_has_set_is_kept(three_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert _inside("cuda") == 3


def test_a_cpu_has_one_thread_or_several(three_threads):
    assert device_name(torch.device("cpu")).endswith(", 3 threads")
    torch.set_num_threads(1)
    assert device_name(torch.device("cpu")).endswith(", 1 thread")
