"""The trainer process: ``python -m bento_service.training RUN_DIRECTORY --attempt N``.

Reads the run's specification, trains it with the recipe of its method, and says how that went in ``outcome.json``,
its last act. Exit status 0: succeeded, or stopped by SIGTERM; 1: failed. Nothing heavy is imported before the first
event is written, except with ``--spare``: everything is imported first, and the job comes later (see ``spare``).
"""

import argparse
import atexit
import contextlib
import errno
import gc
import importlib
import os
import shutil
import sys
import textwrap
import traceback
from pathlib import Path

from bento_service.errors import TrlRemoteError
from bento_service.training import checkpoints, manifest, refused_rows, spare
from bento_service.training.devices import limit_threads
from bento_service.training.events import EventWriter
from bento_service.training.lease import LeaseWatch
from bento_service.training.recipes import RECIPES
from bento_service.training.run_directory import Outcome, RunDirectory
from bento_service.training.stop import StopRequested, StopSwitch

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
    parsed = parser.parse_args(arguments)
    if parsed.spare == (parsed.run_directory is not None and parsed.attempt is not None):
        parser.error("needs a run directory and --attempt, or --spare alone")
    # Nothing is written before the supervisor has recorded this process, so that it can always be found again.
    if parsed.await_go and sys.stdin.readline() != "go\n":
        return 0
    _set_defaults()
    directory, attempt = parsed.run_directory, parsed.attempt
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
        stop.defer()
        run.release_room()
        outcome = failure(error, attempt)
        if outcome.code == "disk_full":
            checkpoints.remove_torn(run)
        _report_failure(events, outcome)
    stop.defer()
    run.release_room()
    shutil.rmtree(run.cache, ignore_errors=True)
    run.write_outcome(outcome)
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
    recipe = importlib.import_module(RECIPES[spec.method])
    limit_threads()
    # A million objects that stay to the end. Else the garbage collector walks them again and again, 0.3 s for each
    # full collection; accelerate asks for one before the first step.
    gc.freeze()
    try:
        status = recipe.run(spec, run, events, stop)
    except Exception as error:
        refused_rows.explain(error, spec)
        raise
    if status == "succeeded":
        manifest.conclude(run)
    return Outcome(attempt=attempt, status=status)


def failure(error: Exception, attempt: int) -> Outcome:
    """The outcome of an attempt that ended with this exception.

    Retryable are causes in the machine (a full disk, a lost GPU); a cause in the request or its data is not.
    """
    # By name, because a failure before torch is imported, or of that import, must be told too.
    torch_kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("torch")}
    code, param, retryable = "internal_error", None, False
    if isinstance(error, TrlRemoteError):
        code, message, param = error.code, error.message, error.param
    elif "OutOfMemoryError" in torch_kinds or isinstance(error, MemoryError) or CPU_OUT_OF_MEMORY in str(error):
        code = "out_of_memory"
        message = (
            f"out of memory ({_text(error)}): use a smaller batch_size with more gradient_accumulation_steps, "
            "a smaller max_length, gradient_checkpointing, or LoRA instead of full fine-tuning"
        )
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        code, retryable = "disk_full", True
        message = f"the disk is full ({error}): free space under TRL_HOME, or keep fewer checkpoints"
    elif isinstance(error, OSError):
        code, retryable = "storage_error", True
        message = f"reading or writing failed: {error}"
    elif "AcceleratorError" in torch_kinds:
        code, retryable = "device_error", True
        message = f"the device failed: {_text(error)}"
    else:
        message = f"{type(error).__name__}: {_text(error)}"
    return Outcome(attempt=attempt, status="failed", code=code, message=message, param=param, retryable=retryable)


def _report_failure(events: EventWriter, outcome: Outcome) -> None:
    """To the log and the events. The outcome, written next, has the reason too: a disk too full for these is borne."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
    with contextlib.suppress(OSError):
        events.write("message", outcome.message or "failed", level="error", code=outcome.code)


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
