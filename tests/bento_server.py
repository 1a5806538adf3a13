"""A real service for tests: its own process, port, TRL_HOME and BENTOML_HOME, ended with the context."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
SERVICE = "bento_service.service:TrlTrainingService"


@dataclass(frozen=True)
class BentoServer:
    url: str
    home: Path  # TRL_HOME
    log_file: Path
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        """Everything that the server and its children have written so far."""
        return self.log_file.read_text(errors="replace")


@contextmanager
def bento_server(
    directory: Path,
    *,
    models: Path | None = None,
    environment: dict[str, str] | None = None,
    as_script: bool = False,
    served: str = SERVICE,
    where: Path | None = None,
    ready_seconds: float = 120,
) -> Iterator[BentoServer]:
    """``bentoml serve`` on a free port, or ``python service.py``; all its state lies under ``directory``.

    ``models`` is its TRL_MODELS_DIR; ``environment`` is added last. ``served`` is what ``bentoml serve`` is told: of
    a Bento's tag or ``.`` the code is in the Bento or in ``where``, the working directory (by default ``directory``),
    and the checkout is not on the path. Ready when this enters: the store answers and a
    supervisor is alive. Raises RuntimeError with the log when it ends early or is not ready in ``ready_seconds``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port, home, log_file = free_port(), directory / "trl", directory / "service.log"
    # What the caller's shell has set for its own service must not reach this one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRL_", "BENTOML_"))}
    variables = {
        **inherited,
        "TRL_HOME": str(home),
        "TRL_HOST": "127.0.0.1",
        "TRL_PORT": str(port),
        "TRL_DEVICE": "cpu",
        "TRL_GRACE_SECONDS": "5",
        "TRL_WARM_TRAINERS": "0",  # its imports would take the CPU of the tests
        "BENTOML_HOME": str(directory / "bentoml"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **({} if models is None else {"TRL_MODELS_DIR": str(models)}),
        **(environment or {}),
    }
    if as_script:
        command, where = [sys.executable, "service.py"], REPOSITORY / "bento_service"
    else:
        # Served from elsewhere, so that nothing may depend on the working directory.
        if served == SERVICE:
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), inherited.get("PYTHONPATH")]))
        else:
            variables.pop("PYTHONPATH", None)
        command = [sys.executable, "-m", "bentoml", "serve", served, "--host", "127.0.0.1", "--port", str(port)]
        where = where or directory
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=where,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = BentoServer(f"http://127.0.0.1:{port}", home, log_file, process)
    try:
        _wait_until_ready(server, ready_seconds)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], *, seconds: float = 30) -> None:
    """SIGTERM, then, for whatever of its descendants is still there after ``seconds``, SIGKILL."""
    family = _family(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=seconds)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, timeout=seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _wait_until_ready(server: BentoServer, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"The service ended with status {server.process.returncode}:\n{server.log()}")
        try:
            if httpx.get(f"{server.url}/readyz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"The service was not ready within {seconds} seconds:\n{server.log()}")
