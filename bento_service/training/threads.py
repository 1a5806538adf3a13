"""How many CPU threads a trainer computes with: as many as it is told, else as many as are fastest here."""

import os
import time
from collections.abc import Callable, Iterable

# A thread less in use is one more for what else the host does.
_WORTH = 1.03

_ROUNDS = 3


def available_cpus() -> int:
    """CPUs that this process may keep busy: by its affinity and by the quota of its control group (a container's)."""
    from joblib import cpu_count

    return int(cpu_count())


def limit_threads(*, computes: bool) -> int:
    """Let PyTorch use as many threads as OMP_NUM_THREADS says, else those that are fastest; answers how many.

    PyTorch reads the variable when it is loaded; a spare trainer has loaded it before it knows its job's environment.
    Without ``computes``, where a GPU does the work, nothing is measured: at most the CPUs that there are for it.
    """
    import torch

    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        torch.set_num_threads(int(given))
    elif computes:
        torch.set_num_threads(fastest(_candidates(), _product_seconds))
    else:
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    return torch.get_num_threads()


def fastest(candidates: Iterable[int], seconds: Callable[[int], float]) -> int:
    """The number of threads with the shortest of some times; the smallest number of those that are as good as that."""
    counts = sorted(set(candidates))
    if len(counts) == 1:
        return counts[0]
    best = {count: min(seconds(count) for _ in range(_ROUNDS)) for count in counts}
    return next(count for count in counts if best[count] <= _WORTH * min(best.values()))


def _candidates() -> set[int]:
    """One thread for each core, and one for each CPU: two to a core where cores have two."""
    from joblib import cpu_count

    return {int(cpu_count(only_physical_cores=True)), available_cpus()}


def _product_seconds(threads: int) -> float:
    """Of a product like those of a small model's layers on a row of packed pairs."""
    import torch

    torch.set_num_threads(threads)
    tokens, weights = torch.ones(1024, 1024), torch.ones(1024, 4096)
    torch.mm(tokens, weights)  # threads are started, memory is taken
    began = time.perf_counter()
    for _ in range(4):
        torch.mm(tokens, weights)
    return time.perf_counter() - began
