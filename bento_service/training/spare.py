"""A trainer that is started before its job: it imports what recipes need, and waits for orders meanwhile.

Its standard input is a socket to the supervisor. It says ``LISTENING`` as soon as it can take orders, long before its
imports are done. One line comes back, ``Orders`` as JSON; the spare takes on the job's environment, folder and log and
answers ``TAKEN``. From then on it is the job's trainer as if it had been started for it. The other end closed means
that nobody will ever give orders: the spare ends at once.
"""

import contextlib
import gc
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import BaseModel

from bento_service.training.run_directory import RunDirectory

LISTENING = b"listening\n"
TAKEN = b"taken\n"

# proc(5): which process the kernel ends first when memory runs out. 1000 is before all others.
_OOM_SCORE = Path("/proc/self/oom_score_adj")


class Orders(BaseModel):
    run_directory: Path
    attempt: int
    environment: dict[str, str]  # all of it


def await_orders(prepare: Callable[[], None]) -> Orders:
    """Run ``prepare``; return when that is done and orders were taken, in whichever order that comes.

    Ends the process when there will be no orders, or when they cannot be followed (the error goes to standard error).
    """
    listener = _Listener()
    listener.start()
    prepare()
    listener.join()
    assert listener.orders is not None
    return listener.orders


def import_all(modules: Iterable[str]) -> None:
    """Import these modules and make ready what they would make ready for the first job."""
    # Both ask for GPUs when they are imported, which others do if they find them. None is the import system's sign for
    # "not there". A spare's job is on one device and never needs DeepSpeed.
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    for module in modules:
        importlib.import_module(module)
    del sys.modules["bitsandbytes"]
    _forget_bitsandbytes_is_missing()
    _compile_conversions()
    gc.collect()  # of what imports left, while nobody waits


class _Listener(threading.Thread):
    """Waits for orders beside the preparations: neither orders nor the supervisor's end have to wait for them."""

    def __init__(self) -> None:
        super().__init__(name="await-orders", daemon=True)
        self.orders: Orders | None = None
        self._oom_score = _OOM_SCORE.read_text() if _OOM_SCORE.exists() else None
        if self._oom_score is not None:
            _OOM_SCORE.write_text("1000")  # rather this one than any trainer with work to lose

    def run(self) -> None:
        _say(LISTENING)
        line = _read_line()
        if not line:
            os._exit(0)
        try:
            orders = Orders.model_validate_json(line)
            self._take(orders)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # without TAKEN the supervisor starts another trainer for the job
        self.orders = orders

    def _take(self, orders: Orders) -> None:
        if self._oom_score is not None:
            _OOM_SCORE.write_text(self._oom_score)
        for name in os.environ.keys() - orders.environment.keys():
            del os.environ[name]
        os.environ.update(orders.environment)
        os.chdir(orders.run_directory)
        log = os.open(RunDirectory(orders.run_directory).log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        _say(TAKEN)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def _say(what: bytes) -> None:
    """To the supervisor. Of one that has died ``_read_line`` hears, or, after its orders, the next one adopts this."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(0, what)


def _read_line() -> bytes:
    """One line from standard input; empty when it was closed before the line's end.

    Not through sys.stdin, whose lock, held while it waits, would make the interpreter abort if imports fail.
    """
    line = b""
    while not line.endswith(b"\n"):
        try:
            part = os.read(0, 65536)
        except ConnectionResetError:
            part = b""
        if not part:
            return b""
        line += part
    return line


def _compile_conversions() -> None:
    """Have transformers build its table of checkpoint formats: about a thousand regular expressions, 0.6 s.

    It keeps the table; the name asked for does not matter.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def _forget_bitsandbytes_is_missing() -> None:
    """A job that needs it imports it then."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from transformers.utils import is_bitsandbytes_available

    for answer in (is_bnb_available, is_bnb_4bit_available, is_bitsandbytes_available):
        answer.cache_clear()
