"""How soon the service is ready: ``python benchmarks/ready.py``.

From the start of ``bentoml serve`` to the first 200 of /readyz, for the service and for a BentoML service that does
nothing, in turns, so that what else the machine does meets both alike. The first start of the service makes its
database; the further ones find it. CPU is that of the main process, the worker and the supervisor until then.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.bento_server import SERVICE, free_port  # noqa: E402

BARE = """
import bentoml

@bentoml.service(workers=1, metrics={"enabled": False})
class Bare:
    @bentoml.api
    def double(self, number: int) -> int:
        return 2 * number
"""
DEADLINE = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bare.py").write_text(BARE)
        for number in range(arguments.rounds + 1):
            name = "the service, further starts" if number else "the service, first start"
            for what, served in ((name, SERVICE), ("a BentoML service that does nothing", "bare:Bare")):
                took, used = start(served, Path(folder))
                seconds[what].append(took)
                cpu[what].append(used)
    for what, values in seconds.items():
        print(
            f"{what}: ready after {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f}), "
            f"{statistics.median(cpu[what]):.2f} s of CPU"
        )


def start(served: str, folder: Path) -> tuple[float, float]:
    """Seconds until it is ready, and of CPU. It is ended again."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TRL_", "BENTOML_"))},
        "PYTHONPATH": str(REPOSITORY),
        "TRL_HOME": str(folder / "trl"),
        "TRL_WARM_TRAINERS": "0",  # a spare trainer's imports come after the start
        "BENTOML_HOME": str(folder / "bentoml"),
    }
    command = [sys.executable, "-m", "bentoml", "serve", served, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("ab") as log:
        began = time.monotonic()
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        while not is_ready(port):
            if server.poll() is not None or time.monotonic() > began + DEADLINE:
                raise RuntimeError((folder / "log").read_text(errors="replace"))
            time.sleep(0.02)
        took = time.monotonic() - began
        main_process = psutil.Process(server.pid)
        times = [process.cpu_times() for process in (main_process, *main_process.children(recursive=True))]
        return took, sum(one.user + one.system for one in times)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(DEADLINE)


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
