"""A trainer keeps to its job's CPU threads also when PyTorch was loaded before the job was known."""

import pytest
import torch

from bento_service.training.devices import limit_threads


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("2", 2), ("", 3), ("4,2", 3), ("0", 3)])
def test_threads_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        limit_threads()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
