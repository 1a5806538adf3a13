"""A real Llama Stack server for tests: started on a free port with its own home, and ended with the context."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parent.parent
SERVE = ("-m", "llama_stack.cli.llama", "stack", "run", "{config}", "--port", "{port}")  # 0.3 and later


@dataclass(frozen=True)
class StackServer:
    url: str
    log_file: Path
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


@contextmanager
def stack_server(
    home: Path,
    service_url: str,
    *,
    config: Path = REPOSITORY / "run_remote.yaml",
    environment: dict[str, str] | None = None,
    start_seconds: float = 120,
    python: str = sys.executable,
    serve: Sequence[str] = SERVE,
) -> Iterator[StackServer]:
    """Llama Stack with ``config``, its adapter pointed at ``service_url``; all its state lies under ``home``.
    ``serve`` is what follows ``python`` on the command line, with {config} and {port} in it.

    The working directory is the repository, as for a user who types ``llama stack run run_remote.yaml`` there.
    Raises RuntimeError with the server's log when it ends early or is not healthy within ``start_seconds``.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    # What the caller's shell has set for its own servers must not reach this one.
    theirs = ("TRL_", "LLAMA_STACK_", "OGX_", "SQLITE_STORE_")
    if python != sys.executable:
        theirs = (*theirs, "PYTHONPATH", "VIRTUAL_ENV")  # another environment has the adapter of its own
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    log_file = home / "stack.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [python, *(part.format(config=config, port=port) for part in serve)],
            cwd=REPOSITORY,
            env={
                **inherited,
                "HOME": str(home),
                "SQLITE_STORE_DIR": str(home / "stores"),
                "TRL_SERVICE_URL": service_url,
                "HF_HUB_OFFLINE": "1",
                "NO_PROXY": "127.0.0.1,localhost",
                "LLAMA_STACK_LOG_WIDTH": "250",
                **(environment or {}),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = StackServer(f"http://127.0.0.1:{port}", log_file, process)
    try:
        _wait_until_healthy(server, start_seconds)
        yield server
    finally:
        _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: StackServer, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with httpx.Client(trust_env=False, timeout=5) as http:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                raise RuntimeError(f"Llama Stack ended with {server.process.returncode}:\n{server.log()}")
            try:
                if http.get(f"{server.url}/v1/health").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    raise RuntimeError(f"Llama Stack was not healthy within {seconds:g} s:\n{server.log()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
