"""A trainer keeps to its CPU threads: those of its job's environment, else the fastest that it may use."""

import os
from collections.abc import Iterator

import pytest
import torch

from bento_service.training import threads
from bento_service.training.threads import available_cpus, fastest, limit_threads


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("2", 2), ("5", 5)])
def test_threads_are_those_of_the_environment_also_when_pytorch_was_loaded_before(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert limit_threads(computes=True) == expected == torch.get_num_threads()


@pytest.mark.parametrize("given", ["", "4,2", "0"])
def test_else_they_are_measured(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(threads, "_candidates", lambda: {1, 2})
    tried = []
    monkeypatch.setattr(threads, "_product_seconds", lambda count: tried.append(count) or 1 / count)
    assert limit_threads(computes=True) == 2 == torch.get_num_threads()
    assert set(tried) == {1, 2}


def test_where_a_gpu_computes_there_are_no_more_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_cpus", lambda: 2)
    assert limit_threads(computes=False) == 2
    monkeypatch.setattr(threads, "available_cpus", lambda: 64)
    assert limit_threads(computes=False) == 2, "PyTorch's own choice is kept"


def test_the_fastest_wins_and_of_equals_the_one_with_fewer_threads() -> None:
    assert fastest({4, 8}, {4: 1.0, 8: 0.7}.__getitem__) == 8
    assert fastest({4, 8}, {4: 1.0, 8: 0.99}.__getitem__) == 4
    assert fastest({4, 8}, {4: 1.0, 8: 1.9}.__getitem__) == 4
    assert fastest({8}, {}.__getitem__) == 8, "nothing is measured"


def test_a_product_takes_time_with_as_many_threads() -> None:
    assert threads._product_seconds(1) > 0
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_a_process_that_may_use_one_cpu_has_one() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
