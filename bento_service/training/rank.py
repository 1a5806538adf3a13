"""One of the processes that train a job on several devices: which one it is, and what they agree on.

``ranks`` starts them. torchrun tells a process its number in RANK and their count in WORLD_SIZE; where these are not
set, the process is the only one.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from bento_service.training.stop import StopSwitch

# How long a rank waits for the others: the first one writes and hashes checkpoints meanwhile.
TIMEOUT_SECONDS = 6 * 3600

_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Rank:
    number: int
    count: int

    @classmethod
    def of_this_process(cls) -> "Rank":
        return cls(number=int(os.environ.get("RANK", "0")), count=int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes events, checkpoints' manifests and the like."""
        return self.number == 0


class AgreedStop(StopSwitch):
    """The stop switch of one rank of several: what one was asked, all do, at the same point of their work."""

    def agreed(self) -> bool:
        return totals(int(self.requested)) > 0


def end_with(parent: int) -> None:
    """End this process, by SIGKILL on Linux, as soon as ``parent`` has ended. Called from the main thread."""
    if sys.platform == "linux":
        # The kernel does it, whatever this process is stuck in.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_await_end, args=(parent,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _await_end(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def join(folder: Path, backend: str) -> None:
    """Make the process group of all ranks, which meet in a file in ``folder``, new for each attempt.

    Left to accelerate, the first rank would listen for the others on every interface, for anybody.
    """
    from torch import distributed

    this = Rank.of_this_process()
    distributed.init_process_group(
        backend,
        store=distributed.FileStore(str(folder / "ranks.store"), this.count),
        rank=this.number,
        world_size=this.count,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )


def totals(value: int) -> int:
    """The sum of what each rank gives; all of them call it at the same point, and it waits for the last one."""
    return sum(of_each(value))


def of_each(value: int) -> list[int]:
    """What each rank gives, by rank number; see ``totals``."""
    if Rank.of_this_process().count == 1:
        return [value]
    import torch
    from torch import distributed

    group = _group()
    values = torch.zeros(distributed.get_world_size(group), dtype=torch.int64)
    values[distributed.get_rank(group)] = value
    distributed.all_reduce(values, group=group)
    return values.tolist()


def first_says(value: Any) -> Any:
    """What the first rank gives; see ``totals``."""
    if Rank.of_this_process().count == 1:
        return value
    from torch import distributed

    said = [value]
    distributed.broadcast_object_list(said, src=0, group=_group())
    return said[0]


@cache
def _group() -> Any:
    """The ranks, talking over sockets and not by their GPUs: nothing that is queued on these is waited for."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
