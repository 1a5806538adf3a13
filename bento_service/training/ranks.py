"""A job on several devices: one trainer process for each, started and watched by torchrun's agent in this process.

The supervisor knows the agent only. Each rank is ``python -m bento_service.training`` on the same run directory; the
first writes the events. An agent that dies takes its ranks with it (``rank.end_with``), a rank that dies ends the
attempt, and a stop goes from the agent to all ranks, which agree on the step after which they stop (``rank``).
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bento_service.errors import UnreadableRun
from bento_service.training.run_directory import Outcome, RunDirectory, write_durably
from bento_service.training.stop import StopSwitch
from bento_service.training.threads import available_cpus

# Of an error that a rank met because another one was gone.
LOST_CODE = "rank_lost"

# Once a rank has stopped on request, the others have this long. While they train they end together, when nothing is
# left to do; before, one that waits for another in vain hears no signal.
_STOP_TOGETHER_SECONDS = 5.0

# What torchrun gives the other ranks when one has failed; its own default.
_SHUTDOWN_SECONDS = 30

# Ends what is copied of a rank's output.
_LAST_LINE = b"\0 end of rank\n"


class RankOutcome(Outcome):
    """How one rank ended, in its own words."""

    rank: int
    time: float  # unix seconds, to tell the first error from those that followed from it


def train(run: RunDirectory, count: int, attempt: int, stop: StopSwitch) -> Outcome:
    """Train with ``count`` ranks, each on a device of its own; how that ended is what they say together."""
    # The agent starts on no GPU; asking how many there are must not make a context on one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // count)))
    if sys.platform == "linux":
        # All ranks are on this host: they need no other network, and nobody else is to reach them.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # Nor through torchrun's TCP store, which listens on every interface and whose values the agent unpickles.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    shutil.rmtree(run.rank_outcomes, ignore_errors=True)
    run.rank_outcomes.mkdir()
    stop.defer()
    messenger = _StopMessenger(stop, run.rank_outcomes, count)
    messenger.start()
    logs = _prefixed_logs()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"{run.path.name}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint=str(run.rank_outcomes / "agent.store"),
        rdzv_configs={"store_type": "file"},
        local_addr="localhost",
        max_restarts=0,  # an attempt is the supervisor's to repeat
        logs_specs=logs,
        shutdown_timeout=_SHUTDOWN_SECONDS,
        signals_to_handle="SIGHUP",  # SIGTERM is the messenger's
    )
    arguments = ("-P", "-m", "bento_service.training", str(run.path))
    exits: dict[int, int] = {}
    try:
        elastic_launch(config, sys.executable)(*arguments, "--attempt", str(attempt), "--rank-of", str(os.getpid()))
    except ChildFailedError as error:
        # Among the failures are also ranks that torchrun has killed, half a minute after the first one failed.
        first = min(failure.timestamp for failure in error.failures.values())
        exits = {
            rank: failure.exitcode
            for rank, failure in error.failures.items()
            if failure.timestamp < first + _SHUTDOWN_SECONDS / 2
        }
    finally:
        logs.finish()
    exits = {rank: code for rank, code in exits.items() if code != -signal.SIGKILL or not messenger.has_killed}
    outcomes = read_outcomes(run.rank_outcomes)
    shutil.rmtree(run.rank_outcomes, ignore_errors=True)
    return conclude(attempt, count, exits, outcomes, stop_requested=stop.requested)


def write_outcome(run: RunDirectory, rank: int, outcome: Outcome) -> None:
    """The last act of a rank."""
    told = RankOutcome(**outcome.model_dump(), rank=rank, time=time.time())
    write_durably(run.rank_outcomes / f"{rank}.json", told.model_dump_json())


def read_outcomes(folder: Path) -> list[RankOutcome]:
    """What the ranks say, the earliest first. Raises UnreadableRun."""
    try:
        found = [RankOutcome.model_validate_json(file.read_bytes()) for file in folder.glob("[0-9]*.json")]
    except ValueError as error:
        raise UnreadableRun(f"an outcome in {folder} cannot be read: {error}") from error
    return sorted(found, key=lambda outcome: outcome.time)


def conclude(
    attempt: int, count: int, exits: Mapping[int, int], outcomes: Sequence[RankOutcome], *, stop_requested: bool
) -> Outcome:
    """The attempt's outcome from its ranks' exit codes, of those that failed, and outcomes, the earliest first.

    What the first rank has finished is finished. Else the first cause counts: a rank that was killed, then an error
    that is not another rank's loss, then a stop.
    """
    first = next((outcome for outcome in outcomes if outcome.rank == 0), None)
    if first is not None and first.status == "succeeded":
        return Outcome(attempt=attempt, status="succeeded")
    told = {outcome.rank for outcome in outcomes}
    # A rank that aborts may do so because another one was lost; SIGTERM is also how torchrun ends those that are left.
    killed = [rank for rank, code in exits.items() if code < 0 and code not in (-signal.SIGABRT, -signal.SIGTERM)]
    if killed:
        return _died(attempt, count, killed[0], exits)
    causes = [outcome for outcome in outcomes if outcome.status == "failed" and outcome.code != LOST_CODE]
    if causes:
        return Outcome(**causes[0].model_dump(include=set(Outcome.model_fields)))
    if stop_requested or any(outcome.status == "stopped" for outcome in outcomes):
        return Outcome(attempt=attempt, status="stopped")
    silent = [rank for rank in range(count) if rank not in told]
    return _died(attempt, count, silent[0] if silent else outcomes[0].rank, exits)


def _died(attempt: int, count: int, rank: int, exits: Mapping[int, int]) -> Outcome:
    code = exits.get(rank)
    how = "was gone" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += " (often the kernel, out of memory)" if code == -signal.SIGKILL else ""
    message = f"rank {rank} of {count} {how}"
    return Outcome(attempt=attempt, status="failed", code="trainer_died", message=message, retryable=True)


class _StopMessenger(threading.Thread):
    """Tells the ranks of a stop, also those that start later, and ends those that cannot hear of it."""

    def __init__(self, stop: StopSwitch, outcomes: Path, count: int) -> None:
        super().__init__(name="stop-messenger", daemon=True)
        self._stop_switch = stop
        self._outcomes = outcomes
        self._count = count
        self.has_killed = False

    def run(self) -> None:
        told: set[int] = set()
        overdue: float | None = None
        while True:
            time.sleep(0.1)
            if not self._stop_switch.requested:
                continue
            ranks = psutil.Process().children()
            for rank in ranks:
                if rank.pid not in told:
                    told.add(rank.pid)
                    _signal(rank, signal.SIGTERM)
            ended = len(list(self._outcomes.glob("[0-9]*.json")))
            if overdue is None and 0 < ended < self._count:
                overdue = time.monotonic() + _STOP_TOGETHER_SECONDS
            if overdue is not None and time.monotonic() > overdue:
                self.has_killed = True
                for rank in ranks:
                    _signal(rank, signal.SIGKILL)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _prefixed_logs() -> Any:
    """torchrun's LogsSpecs by which what ranks print goes to this process's standard output, with their numbers.

    Through pipes that this process reads, so that a rank's last words are kept however it ends. ``finish`` waits until
    all of them are written.
    """
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class PrefixedLogs(LogsSpecs):
        def __init__(self) -> None:
            super().__init__()
            self._copiers: dict[int, threading.Thread] = {}  # by the writing end of their pipe

        @property
        def root_log_dir(self) -> str:
            return os.devnull

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            paths = {}
            for rank in envs:
                reader, writer = os.pipe()
                paths[rank] = f"/dev/fd/{writer}"  # torchrun opens it
                self._copiers[writer] = threading.Thread(target=_copy_lines, args=(reader, rank), daemon=True)
                self._copiers[writer].start()
            return LogsDest(stdouts=paths, stderrs=dict(paths), error_files=dict.fromkeys(envs, os.devnull))

        def finish(self) -> None:
            for writer, copier in self._copiers.items():
                os.write(writer, _LAST_LINE)  # torchrun does not close its own ends
                copier.join()

    return PrefixedLogs()


def _copy_lines(source: int, rank: int) -> None:
    with os.fdopen(source, "rb") as lines:
        for line in lines:
            text = line.removesuffix(_LAST_LINE)
            if text:
                os.write(1, b"[rank %d] %s" % (rank, text if text.endswith(b"\n") else text + b"\n"))
            if line.endswith(_LAST_LINE):
                return
