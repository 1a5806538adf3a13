"""One trainer process: starting, watching and stopping it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

import bento_service
from bento_service.training.run_directory import RunDirectory
from bento_service.training.spare import LISTENING, TAKEN, Orders

# What a trainer gets of the service's environment. The rest, API keys and the database's address among it,
# stays out.
_ALLOWED_NAMES = {
    "HOME", "LANG", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "PYTHONHOME",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "XDG_CACHE_HOME", "CI",
}  # fmt: skip
_ALLOWED_PREFIXES = (
    "CUDA_", "HF_", "LC_", "MALLOC_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_", "TORCH_", "TRANSFORMERS_",
)  # fmt: skip

# -P: the working directory is not searched for modules.
_TRAINER = (sys.executable, "-P", "-m", "bento_service.training")

# Should an import ask whether there is a GPU, PyTorch asks the driver's management library. The driver itself reads
# CUDA_VISIBLE_DEVICES once, when it is first asked, and a spare gets its device later.
_SPARE_ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

# A step on a CPU takes and frees activations in blocks of megabytes. glibc gives such blocks back to the system at
# once, and the next ones come zeroed, page by page (docs/performance.md). With these bounds, in bytes, a trainer keeps
# what it has had.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}

# Child processes find this package here, installed or not.
PACKAGE_PARENT = str(Path(bento_service.__file__).parents[1])


@dataclass(frozen=True)
class Exit:
    """How a process ended; both None when it was not our child, so that nobody told us."""

    code: int | None = None
    signal: int | None = None

    def describe(self) -> str:
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            hint = " (often the kernel, out of memory)" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
        return "gone" if self.code is None else f"exit code {self.code}"


class Trainer(Protocol):
    """A trainer as the supervisor sees it."""

    @property
    def pid(self) -> int: ...

    @property
    def created_at(self) -> float: ...

    def poll(self) -> Exit | None:
        """None while it runs."""

    def terminate(self) -> None:
        """Ask it to save a checkpoint and end: SIGTERM to its process group."""

    def kill(self) -> None:
        """SIGKILL to its process group."""


class _Child:
    """A trainer that this process started, as the leader of a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid
        self.created_at = psutil.Process(self.pid).create_time()

    def poll(self) -> Exit | None:
        code = self._process.poll()
        if code is None:
            return None
        return Exit(code=code) if code >= 0 else Exit(signal=-code)

    def terminate(self) -> None:
        _signal_group(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        _signal_group(self.pid, signal.SIGKILL)


class LaunchedTrainer(_Child):
    """A trainer started for a job. It does nothing until ``go``, and ends if that never comes.

    So that a supervisor killed between starting a trainer and recording its pid leaves no trainer behind.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        command: Sequence[str] | None = None,
        attempt: int,
        environment: Mapping[str, str],
    ) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        with run.log_file.open("ab") as log:
            process = subprocess.Popen(
                [*(command or _TRAINER), str(run.path), "--attempt", str(attempt), "--await-go"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run.path,
                env=environment,
                start_new_session=True,
            )
        super().__init__(process)

    def go(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died already; poll() tells how


class SpareTrainer(_Child):
    """A trainer started before its job, importing, then waiting (``training.spare``). It serves one job.

    It ends when this process does, or when ``kill`` is called, unless it has taken a job.
    """

    def __init__(self, environment: Mapping[str, str], *, command: Sequence[str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    [*(command or _TRAINER), "--spare"],
                    stdin=theirs.fileno(),
                    env={**environment, **_SPARE_ENVIRONMENT},
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        self._channel = ours
        self._listening = False
        super().__init__(process)

    def is_listening(self) -> bool:
        """Whether it has got far enough to take a job: its interpreter runs."""
        if not self._listening:
            try:
                self._listening = self._channel.recv(len(LISTENING), socket.MSG_DONTWAIT) == LISTENING
            except OSError:  # nothing said yet, or gone
                return False
        return self._listening

    def take(self, orders: Orders, *, within: float) -> bool:
        """Make it the trainer of a job; False when it did not answer within so many seconds, and was killed.

        The caller has recorded its pid before, so that it can be found again.
        """
        self._channel.settimeout(within)
        try:
            with self._channel:
                self._channel.sendall(orders.model_dump_json().encode() + b"\n")
                taken = self._channel.recv(len(TAKEN)) == TAKEN
        except OSError:  # it died, or did not answer in time
            taken = False
        if not taken:
            self.kill()
        return taken

    def kill(self) -> None:
        self._channel.close()
        super().kill()


class AdoptedTrainer:
    """A trainer that an earlier supervisor started; recognised by pid and creation time."""

    def __init__(self, pid: int, created_at: float) -> None:
        self.pid = pid
        self.created_at = created_at

    def poll(self) -> Exit | None:
        return None if is_alive(self.pid, self.created_at) else Exit()

    def terminate(self) -> None:
        if self.poll() is None:
            _signal_group(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            _signal_group(self.pid, signal.SIGKILL)


# Stands for the trainer of an attempt that has none on this host, or had none yet.
NO_TRAINER = AdoptedTrainer(pid=0, created_at=0.0)


def is_alive(pid: int, created_at: float) -> bool:
    """Whether this very process still runs (a zombie does not)."""
    if pid <= 0:
        return False
    try:
        process = psutil.Process(pid)
        # psutil derives the time from boot time and clock ticks: a hundredth of a second at best.
        return abs(process.create_time() - created_at) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def trainer_environment(devices: Sequence[str], kind: str, threads: int | None = None) -> dict[str, str]:
    """The environment of a trainer on these devices; ``threads`` limits its CPU threads."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _ALLOWED_NAMES or name.startswith(_ALLOWED_PREFIXES)
    }
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONPATH"] = PACKAGE_PARENT
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices) if kind == "cuda" else ""
    if kind == "cpu":
        environment = _KEEP_FREED_MEMORY | environment
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _signal_group(pid: int, number: signal.Signals) -> None:
    # The trainer leads its own session, so its group's id is its pid.
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass  # ended in the meantime, which is what was wanted
