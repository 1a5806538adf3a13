"""The trainer process: ``python -m bento_service.training RUN_DIRECTORY --attempt N``.

Reads the run's specification, trains it with the recipe of its method, and says how that went in ``outcome.json``,
its last act. Exit status 0: succeeded, or stopped by SIGTERM; 1: failed. Nothing heavy is imported before the first
event is written, except with ``--spare``: everything is imported first, and the job comes later (see ``spare``).
Of a job on several devices it starts a process for each, ``--rank-of`` itself, and trains nothing (see ``ranks``).
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import os
import shutil
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Literal

from bento_service.errors import TrlRemoteError
from bento_service.training import checkpoints, manifest, rank, ranks, refused_rows, spare
from bento_service.training.devices import find_device
from bento_service.training.events import EventWriter, MutedWriter
from bento_service.training.full_disk import is_full_disk
from bento_service.training.lease import LeaseWatch
from bento_service.training.recipes import RECIPES
from bento_service.training.run_directory import Outcome, RunDirectory
from bento_service.training.spec import TrainingSpec
from bento_service.training.stop import StopRequested, StopSwitch
from bento_service.training.threads import limit_threads

# What PyTorch's CPU allocator says when malloc fails; on GPUs there is an exception class for it.
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def main(arguments: list[str] | None = None) -> int:
    """Carry out one attempt; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bento_service.training")
    parser.add_argument("run_directory", type=Path, nargs="?")
    parser.add_argument("--attempt", type=int, help="which launch of the job this is, from 1")
    parser.add_argument(
        "--await-go",
        action="store_true",
        help="do nothing until a line 'go' comes on standard input; end if that is closed without one",
    )
    parser.add_argument(
        "--spare",
        action="store_true",
        help="import everything, and wait for run directory and attempt on standard input, a socket",
    )
    parser.add_argument(
        "--rank-of", type=int, metavar="PID", help="be one of several processes of an attempt, for that one's time"
    )
    parsed = parser.parse_args(arguments)
    if parsed.spare == (parsed.run_directory is not None and parsed.attempt is not None):
        parser.error("needs a run directory and --attempt, or --spare alone")
    # Nothing is written before the supervisor has recorded this process, so that it can always be found again.
    if parsed.await_go and sys.stdin.readline() != "go\n":
        return 0
    _set_defaults()
    directory, attempt = parsed.run_directory, parsed.attempt
    if parsed.rank_of is not None:
        rank.end_with(parsed.rank_of)
        return _be_rank(RunDirectory(directory.absolute()), attempt)
    if parsed.spare:
        orders = spare.await_orders(lambda: spare.import_all(RECIPES.values()))
        directory, attempt = orders.run_directory, orders.attempt
        _set_defaults()  # the environment is the job's

    stop = StopSwitch()
    run = RunDirectory(directory.absolute())
    events = EventWriter(run.events_file)
    stop.install()
    LeaseWatch(run.lease_file).start()
    try:
        outcome = _train(run, events, stop, attempt)
    except StopRequested:
        outcome = Outcome(attempt=attempt, status="stopped")
    except Exception as error:
        outcome = failure(error, attempt)
        _print_traceback()
    stop.defer()
    run.release_room()
    if outcome.code == "disk_full":
        checkpoints.remove_torn(run)
    if outcome.status == "failed":
        _report_failure(run, outcome)
    shutil.rmtree(run.cache, ignore_errors=True)
    run.write_outcome(outcome)
    return 1 if outcome.status == "failed" else 0


def _be_rank(run: RunDirectory, attempt: int) -> int:
    """Train as one of several ranks; the agent (``ranks``) has made the run directory ready and ends the attempt."""
    this = rank.Rank.of_this_process()
    stop = rank.AgreedStop()
    stop.install()
    LeaseWatch(run.lease_file).start()
    try:
        spec = run.read_spec()
        backend = "cuda:nccl,cpu:gloo" if find_device(spec.device).kind == "cuda" else "gloo"
        rank.join(run.rank_outcomes, backend)
        status = _run_recipe(run, spec, EventWriter(run.events_file) if this.is_first else MutedWriter(), stop)
        if status == "succeeded" and this.is_first:
            manifest.conclude(run)
        outcome = Outcome(attempt=attempt, status=status)
    except StopRequested:
        outcome = Outcome(attempt=attempt, status="stopped")
    except Exception as error:
        outcome = failure(error, attempt)
        _print_traceback()
        run.release_room()
    stop.defer()
    ranks.write_outcome(run, this.number, outcome)
    return 1 if outcome.status == "failed" else 0


def _set_defaults() -> None:
    """What the environment of a trainer holds unless the operator chose otherwise."""
    # TRL reports its use to the Hugging Face hub unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # A trainer on a CPU shares its cores. OpenMP threads that spin while they wait made a forward pass two to three
    # times slower on two cores that others used as well. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _train(run: RunDirectory, events: EventWriter, stop: StopSwitch, attempt: int) -> Outcome:
    run.reserve_room()
    events.write("message", "starting", attempt=attempt)
    spec = run.read_spec()
    for torn in checkpoints.remove_torn(run):
        events.write("message", f"{torn.name} was not saved to the end: deleted", level="warn", removed=str(torn))
    checkpoints.report_missed(events, run)
    if spec.ranks > 1:
        events.close()
        return ranks.train(run, spec.ranks, attempt, stop)
    status = _run_recipe(run, spec, events, stop)
    if status == "succeeded":
        manifest.conclude(run)
    return Outcome(attempt=attempt, status=status)


def _run_recipe(
    run: RunDirectory, spec: TrainingSpec, events: EventWriter, stop: StopSwitch
) -> Literal["succeeded", "stopped"]:
    recipe = importlib.import_module(RECIPES[spec.method])
    threads = limit_threads(computes=find_device(spec.device).kind == "cpu")
    events.write("message", f"computing with {threads} CPU {'thread' if threads == 1 else 'threads'}")
    # A million objects that stay to the end. Else the garbage collector walks them again and again, 0.3 s for each
    # full collection; accelerate asks for one before the first step.
    gc.freeze()
    try:
        return recipe.run(spec, run, events, stop)
    except Exception as error:
        refused_rows.explain(error, spec)
        raise


def failure(error: Exception, attempt: int) -> Outcome:
    """The outcome of an attempt that ended with this exception.

    Retryable are causes in the machine (a full disk, a lost GPU); a cause in the request or its data is not.
    """
    # By name, because a failure before torch is imported, or of that import, must be told too.
    torch_kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("torch")}
    code, param, retryable = "internal_error", None, False
    if isinstance(error, TrlRemoteError):
        code, message, param = error.code, error.message, error.param
    elif _is_lost_rank(error):
        code, retryable = ranks.LOST_CODE, True
        message = f"another rank of the job was lost: {_text(error)}"
    elif is_full_disk(error):
        code, retryable = "disk_full", True
        message = f"the disk is full ({_text(error)}): free space under TRL_HOME, or keep fewer checkpoints"
    elif "OutOfMemoryError" in torch_kinds or isinstance(error, MemoryError) or CPU_OUT_OF_MEMORY in str(error):
        code = "out_of_memory"
        message = (
            f"out of memory ({_text(error)}): use a smaller batch_size with more gradient_accumulation_steps, "
            "a smaller max_length, gradient_checkpointing, or LoRA instead of full fine-tuning"
        )
    elif isinstance(error, OSError):
        code, retryable = "storage_error", True
        message = f"reading or writing failed: {error}"
    elif "AcceleratorError" in torch_kinds:
        code, retryable = "device_error", True
        message = f"the device failed: {_text(error)}"
    else:
        message = f"{type(error).__name__}: {_text(error)}"
    return Outcome(attempt=attempt, status="failed", code=code, message=message, param=param, retryable=retryable)


def _is_lost_rank(error: Exception) -> bool:
    """Whether the cause is that another rank has ended: what torch.distributed and its backends raise then."""
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("torch")}
    if kinds & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    # Gloo says RuntimeError.
    return isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "Connection closed by peer" in str(error))


def _print_traceback() -> None:
    with contextlib.suppress(OSError):  # of a full disk
        traceback.print_exc()


def _report_failure(run: RunDirectory, outcome: Outcome) -> None:
    """To the events. The outcome, written next, has the reason too: a disk too full for this is borne."""
    with contextlib.suppress(OSError):
        # Opened anew: of several ranks the first has written since.
        EventWriter(run.events_file).write("message", outcome.message or "failed", level="error", code=outcome.code)


def _text(error: Exception) -> str:
    """The error's own words on one line, at most 300 characters of them."""
    return textwrap.shorten(str(error), 300) or type(error).__name__


if __name__ == "__main__":
    status = main()
    # Python's own end would free object by object, for half a second of CPU, what the kernel takes back at once.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
