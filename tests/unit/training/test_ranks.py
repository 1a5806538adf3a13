"""What an attempt of several ranks comes to, from what each of them did."""

import pytest

from bento_service.training.ranks import LOST_CODE, RankOutcome, conclude

KILLED, ABORTED, ENDED = -9, -6, -15


def told(rank, status, code=None, *, at, **values):
    return RankOutcome(attempt=3, status=status, code=code, rank=rank, time=at, **values)


def done(rank, at=1.0):
    return told(rank, "succeeded", at=at)


def lost(rank, at=2.0):
    return told(rank, "failed", LOST_CODE, at=at, retryable=True)


def out_of_memory(rank, at=1.0):
    return told(rank, "failed", "out_of_memory", at=at, message="out of memory")


@pytest.mark.parametrize(
    ("exits", "outcomes", "stop", "status", "code", "retryable", "says"),
    [
        ({}, [done(0), done(1)], False, "succeeded", None, False, ""),
        # The first rank has finished all there was.
        ({1: ABORTED}, [done(0)], False, "succeeded", None, False, ""),
        ({0: 1, 1: KILLED}, [lost(0)], False, "failed", "trainer_died", True, "rank 1 of 2 was killed by SIGKILL"),
        # An error that follows from a kill is not recognised as such: the kill counts all the same.
        ({0: 1, 1: KILLED}, [out_of_memory(0)], False, "failed", "trainer_died", True, "rank 1"),
        ({0: 1, 1: 1}, [out_of_memory(1), lost(0)], False, "failed", "out_of_memory", False, "out of memory"),
        # NCCL aborts a process when another one is gone; torchrun ends those that are left with SIGTERM.
        ({0: ABORTED, 1: 1}, [out_of_memory(1)], False, "failed", "out_of_memory", False, "out of memory"),
        ({0: ENDED, 1: 1}, [out_of_memory(1)], False, "failed", "out_of_memory", False, "out of memory"),
        ({1: 75}, [lost(0)], False, "failed", "trainer_died", True, "rank 1 of 2 ended with exit code 75"),
        ({0: 1, 1: 1}, [lost(0), lost(1)], False, "failed", "trainer_died", True, "rank 0"),
        ({}, [told(0, "stopped", at=1.0), told(1, "stopped", at=1.1)], True, "stopped", None, False, ""),
        # One left before training, the other waited for it in vain.
        ({0: 1}, [told(1, "stopped", at=1.0), lost(0)], True, "stopped", None, False, ""),
        # A signal that came before the process could take it.
        ({1: ENDED}, [told(0, "stopped", at=1.0)], True, "stopped", None, False, ""),
        ({0: 1}, [told(0, "failed", "disk_full", at=1.0), lost(1)], True, "failed", "disk_full", False, ""),
    ],
)
def test_the_first_cause_is_the_outcome(exits, outcomes, stop, status, code, retryable, says):
    found = conclude(3, 2, exits, outcomes, stop_requested=stop)
    assert (found.attempt, found.status, found.code, found.retryable) == (3, status, code, retryable)
    assert says in (found.message or "")
