"""How long a job takes to its first optimizer step: ``python benchmarks/start.py [MODEL_FOLDER ...]``.

The same DPO run, the same data, four ways that take turns, so that what else the machine does meets all alike:

- script: ``examples/dpo_script.py``, TRL alone, from the start of its process;
- recipe: ``python -m bento_service.training`` by hand, from the start of its process;
- cold job: a job of a service with ``TRL_WARM_TRAINERS=0``, from before its POST;
- warm job: a job of a service with ``TRL_WARM_TRAINERS=1`` whose spare has finished its imports, from before its POST.

Each is timed until the first step's metrics are written, and until all is over: the process gone, or the job
succeeded. All must report the same losses. Without a model folder a tiny random model is made. Each round starts with
another way.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from dpo_speed import load_pairs  # noqa: E402

from bento_service.training.events import read_events  # noqa: E402
from bento_service.training.run_directory import RunDirectory  # noqa: E402
from tests.bento_server import BentoServer, bento_server  # noqa: E402
from tests.trainer_run import ENVIRONMENT, make_run  # noqa: E402

DATA = REPOSITORY / "examples" / "preferences.jsonl"
DEADLINE = 600.0  # seconds, for any one run


class Times(NamedTuple):
    first: float  # seconds to the first step
    total: float  # seconds in all
    losses: list[float]


def script(model: Path, data: Path, batch_size: int) -> Times:
    command = [sys.executable, str(REPOSITORY / "examples" / "dpo_script.py"), str(model), str(data)]
    began = time.time()
    with subprocess.Popen(
        [*command, "--batch-size", str(batch_size)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        logs = [(time.time(), json.loads(line)) for line in process.stdout if b'"loss"' in line]
        assert process.wait() == 0
    return Times(logs[0][0] - began, time.time() - began, [log["loss"] for _, log in logs])


def recipe(model: Path, data: Path, batch_size: int) -> Times:
    with tempfile.TemporaryDirectory() as scratch:
        run = make_run(Path(scratch), model, data, batch_size=batch_size, learning_rate=1e-5, seed=42)
        began = time.time()
        subprocess.run(
            [sys.executable, "-m", "bento_service.training", scratch, "--attempt", "1"],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        ended = time.time()
        first, losses = steps(run)
        return Times(first - began, ended - began, losses)


def job(server: BentoServer, model: str, data: Path, batch_size: int) -> Times:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        file = client.post("/v1/files", files={"file": data.open("rb")}, data={"purpose": "fine-tune"}).json()["id"]
        body = {"model": model, "training_file": file}
        hyperparameters = {"batch_size": batch_size, "n_epochs": 1}
        method = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
        began = time.time()
        answer = client.post("/v1/fine_tuning/jobs", json=body | {"method": method}).raise_for_status().json()
        while (status := client.get(f"/v1/fine_tuning/jobs/{answer['id']}").json())["status"] != "succeeded":
            assert status["status"] in ("validating_files", "queued", "running"), status
            assert time.time() - began < DEADLINE, server.log()
            time.sleep(0.05)
        ended = time.time()
    first, losses = steps(RunDirectory(server.home / "runs" / answer["id"]))
    return Times(first - began, ended - began, losses)


def steps(run: RunDirectory) -> tuple[float, list[float]]:
    """When the first optimizer step was reported, seconds since the epoch, and the losses of all."""
    metrics = [event for event in read_events(run.events_file)[0] if event.type == "metrics"]
    return metrics[0].time, [event.data["loss"] for event in metrics]


def wait_for_spare(server: BentoServer) -> psutil.Process:
    """The service's spare trainer, when it has done its imports: alive and without any CPU time for a second."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for process in psutil.Process(server.process.pid).children(recursive=True):
            try:
                if "--spare" not in process.cmdline():
                    continue
                before = process.cpu_times()
                time.sleep(1)
                if process.cpu_times() == before and before.user > 1:
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    raise TimeoutError(f"no spare trainer in {DEADLINE} s:\n{server.log()}")


def measure(
    model: Path, source: Path, rows: int, batch_size: int, rounds: int
) -> tuple[dict[str, list[Times]], dict[str, float]]:
    """Times of each way, and the memory of an idle spare in MB."""
    times: dict[str, list[Times]] = {way: [] for way in ("script", "recipe", "cold job", "warm job")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(pair) + "\n" for pair in load_pairs(source, rows)))
        name = "bench/model"
        copy = folder / "models" / name  # a link out of the models folder is refused
        shutil.copytree(model, copy)
        with (
            bento_server(folder / "cold", models=folder / "models") as cold,
            bento_server(folder / "warm", models=folder / "models", environment={"TRL_WARM_TRAINERS": "1"}) as warm,
        ):
            ways: dict[str, Callable[[], Times]] = {
                "script": lambda: script(copy, data, batch_size),
                "recipe": lambda: recipe(copy, data, batch_size),
                "cold job": lambda: job(cold, name, data, batch_size),
                "warm job": lambda: job(warm, name, data, batch_size),
            }
            names = list(ways)
            for number in range(rounds):
                for way in names[number % 4 :] + names[: number % 4]:
                    memory = wait_for_spare(warm).memory_full_info()  # idle while the others run, too
                    times[way].append(ways[way]())
    return times, {"resident": memory.rss / 1e6, "of its own": memory.uss / 1e6}


def report(model: str, times: dict[str, list[Times]], memory: dict[str, float]) -> dict[str, Any]:
    wanted = times["script"][0].losses
    for way, runs in times.items():
        for run in runs:
            same = all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(run.losses, wanted, strict=True))
            assert same, f"{way} does not train as the script does: {run.losses}, {wanted}"
    medians = {
        way: (statistics.median(run.first for run in runs), statistics.median(run.total for run in runs))
        for way, runs in times.items()
    }
    table = Table("", "to the first step, s", "of the script's", "in all, s", title=model)
    for way, (first, total) in medians.items():
        table.add_row(way, f"{first:.2f}", f"{first / medians['script'][0]:.2f}", f"{total:.2f}")
    console = Console()
    console.print(table)
    first = medians["warm job"][0] / medians["script"][0]
    over = medians["warm job"][1] - 1.03 * medians["recipe"][1]
    console.print(f"warm job to its first step: {first:.2f} of the script's time (target: under 0.33)")
    console.print(f"warm job in all: 1.03 x the recipe's time {over:+.2f} s (target: under +1 s)")
    console.print("idle spare: " + ", ".join(f"{value:.0f} MB {name}" for name, value in memory.items()))
    return {"model": model, "seconds": times, "spare_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="model folders; a tiny random model without any")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="preference pairs, JSON Lines, also gzipped")
    parser.add_argument("--rows", type=int, default=16, help="how many of them")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write every time here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = options.models
        if not models:
            tiny = f"from tests.tiny_model import *; make_tiny_model(Path({scratch!r}) / 'tiny')"
            subprocess.run([sys.executable, "-c", tiny], cwd=REPOSITORY, capture_output=True, check=True)
            models = [Path(scratch) / "tiny"]
        results = [
            report(
                model.name, *measure(model.absolute(), options.data, options.rows, options.batch_size, options.rounds)
            )
            for model in models
        ]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
