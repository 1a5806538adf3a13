"""How fast the service answers while its store is full: ``python benchmarks/engine.py``.

Seeds SQLite stores of 100 and of 10,000 jobs, starts a real ``bentoml serve`` on each, and measures over HTTP, with
plain sockets that are kept open. Load comes from a process of its own. Numbers are medians over the rounds, in which
the two stores take turns, so that what else the machine does meets both alike.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import sqlalchemy as sa  # noqa: E402

from bento_service.jobs import schema  # noqa: E402
from bento_service.jobs.database import open_engine  # noqa: E402
from bento_service.jobs.job import JobStatus, Lease  # noqa: E402
from bento_service.jobs.rows import job_values  # noqa: E402
from bento_service.jobs.store import Store  # noqa: E402
from tests.bento_server import BentoServer, bento_server  # noqa: E402
from tests.core_factory import MODEL, PAIRS, json_lines  # noqa: E402
from tests.job_factory import make_file, make_job  # noqa: E402

# Writes one event a second, each with the time of its writing.
TRAINER = """
import argparse, time
from pathlib import Path
from bento_service.training.events import EventWriter
from bento_service.training.run_directory import Outcome, RunDirectory
parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("--attempt", type=int)
parser.add_argument("--await-go", action="store_true")
arguments = parser.parse_args()
input()
run = RunDirectory(arguments.run)
events = EventWriter(run.events_file)
events.write("progress", "Training starts", step=0, total_steps={steps}, epoch=0.0, tokens=0)
for step in range(1, {steps} + 1):
    time.sleep(0.37)
    events.write("metrics", "Step", step=step, total_steps={steps}, epoch=0.0, tokens=step, written=time.time())
run.write_outcome(Outcome(attempt=arguments.attempt, status="succeeded"))
"""
WATCHED_STEPS = 20

WARM_UP = 0.5  # seconds

# Of the stored jobs, these wait in the queue; the others have ended.
QUEUED_SHARE = 0.1


@dataclass(frozen=True)
class Load:
    """What a load process saw. Latencies in seconds."""

    latencies: list[float]
    seconds: float

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Seeded:
    ended: list[str]  # job ids
    queued: list[str]  # in the order of the queue


def seed(home: Path, *, jobs: int, events: int) -> Seeded:
    """A store of ended and queued jobs, the events evenly on all of them."""
    engine = open_engine(f"sqlite:///{home / 'trl-remote.db'}")
    template = job_values(make_job())
    spec, request = template["spec"], template["request"]
    now = time.time()
    queued_count = int(jobs * QUEUED_SHARE)
    each = max(1, events // jobs)
    rows, ids = [], []
    for number in range(jobs):
        job_id = f"ftjob-{number:024x}"
        ids.append(job_id)
        queued = number >= jobs - queued_count
        times = {"queued_at": now, "started_at": None, "finished_at": None}
        if not queued:
            times |= {"started_at": now - 600 - number, "finished_at": now - number}
        rows.append(
            template
            | times
            | {
                "id": job_id,
                "spec": spec | {"job_id": job_id},
                "request": request,
                "status": (JobStatus.QUEUED if queued else JobStatus.SUCCEEDED).value,
                "progress": {"step": 100, "total_steps": 100, "metrics": {"loss": 0.5, "rewards/margins": 0.25}},
                "not_before": now + 86400 if queued else 0.0,  # stays in the queue while this measures
                "event_seq": each,
                "attempt": 0 if queued else 1,
            }
        )
    data = json.dumps({"step": 5, "total_steps": 100, "epoch": 0.5, "tokens": 800, "loss": 0.5, "grad_norm": 1.5})
    with engine.begin() as connection:
        file = make_file()
        connection.execute(schema.files.insert().values(**{k: getattr(file, k) for k in file.__dataclass_fields__}))
        connection.execute(schema.jobs.insert(), rows)
        insert = sa.text(
            "WITH RECURSIVE n(seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM n WHERE seq < :each) "
            "INSERT INTO events (job_id, seq, created_at, type, level, message, data) "
            "SELECT jobs.id, n.seq, :now, 'metrics', 'info', 'Step 5 of 100', :data FROM jobs, n"
        )
        connection.execute(insert, {"each": each, "now": now, "data": data})
    engine.dispose()
    return Seeded(ids[: jobs - queued_count], ids[jobs - queued_count :])


# ------------------------------------------------------------------------- load


def load(url: str, paths: list[str], *, clients: int, seconds: float) -> Load:
    """GET the paths, at random, from so many connections that each wait for their answer, in another process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (url, paths, clients, seconds))


def _load(url: str, paths: list[str], clients: int, seconds: float) -> Load:
    import uvloop

    return uvloop.run(_clients(url, paths, clients, seconds))


async def _clients(url: str, paths: list[str], clients: int, seconds: float) -> Load:
    host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
    requests = [f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode() for path in paths]
    await asyncio.gather(*(_client(host, port, requests, time.perf_counter() + WARM_UP) for _ in range(clients)))
    start = time.perf_counter()
    found = await asyncio.gather(*(_client(host, port, requests, start + seconds) for _ in range(clients)))
    return Load([latency for latencies in found for latency in latencies], time.perf_counter() - start)


async def _client(host: str, port: int, requests: list[bytes], until: float) -> list[float]:
    reader, writer = await asyncio.open_connection(host, port)
    latencies = []
    while (start := time.perf_counter()) < until:
        writer.write(random.choice(requests))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the service answered {head.decode(errors='replace')}")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        latencies.append(time.perf_counter() - start)
    writer.close()
    return latencies


# --------------------------------------------------------------------- measures


def claims_per_second(jobs: int) -> float:
    """Claim and finish on the store itself, with so many jobs in the queue."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        seed(home, jobs=jobs, events=jobs)
        store = Store.open(f"sqlite:///{home / 'trl-remote.db'}")
        with open_engine(f"sqlite:///{home / 'trl-remote.db'}").begin() as connection:
            connection.execute(schema.jobs.update().values(not_before=0.0))
        count = min(200, int(jobs * QUEUED_SHARE))
        start = time.perf_counter()
        for _ in range(count):
            job = store.claim("benchmark", host="here", free_devices=1, lease_seconds=60)
            assert job is not None
            store.finish(Lease(job_id=job.id, token=job.lease_token), JobStatus.SUCCEEDED, "done")
        seconds = time.perf_counter() - start
        store.close()
    return count / seconds


def watch_latencies(server: BentoServer) -> list[float]:
    """Seconds between a trainer's write of an event and its arrival at a client of the stream."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        file = client.post("/v1/files", files={"file": ("pairs.jsonl", json_lines(PAIRS))}).json()["id"]
        body = {"model": MODEL, "training_file": file, "trl": {"priority": 100}}
        job = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        found = []
        with client.stream("GET", f"/v1/fine_tuning/jobs/{job}/events?stream=true") as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    written = json.loads(line.removeprefix("data: "))["data"].get("written")
                    if written is not None:
                        found.append(time.time() - written)
    if len(found) != WATCHED_STEPS:
        raise RuntimeError(f"the stream had {len(found)} of {WATCHED_STEPS} events:\n{server.log()}")
    return found


def processes(server: BentoServer) -> dict[str, psutil.Process]:
    arbiter = psutil.Process(server.process.pid)
    found = {"arbiter": arbiter}
    for process in arbiter.children(recursive=True):
        command = process.cmdline()
        if "bento_service.jobs" in command:
            found["supervisor"] = process
        elif "_bentoml_impl.worker.service" in command:
            found["API worker"] = process
    return found


def measure(server: BentoServer, seeded: Seeded, *, seconds: float) -> dict[str, float]:
    jobs = "/v1/fine_tuning/jobs"
    ended = [f"{jobs}/{job}" for job in random.sample(seeded.ended, min(500, len(seeded.ended)))]
    cases: list[tuple[str, list[str], int]] = [
        ("status", ended, 1),
        ("status", ended, 16),
        ("status, end of the queue", [f"{jobs}/{seeded.queued[-1]}"], 1),
        ("list page, 20 ended", [f"{jobs}?after={seeded.queued[0]}"], 1),
        ("list page, 20 queued", [jobs], 1),
        ("events page, 20", [f"{job}/events" for job in ended], 1),
    ]
    found = {}
    worker = processes(server)["API worker"]
    for name, paths, clients in cases:
        who = "1 client" if clients == 1 else f"{clients} clients"
        before = sum(worker.cpu_times()[:2])
        result = load(server.url, paths, clients=clients, seconds=seconds)
        # The warm-up's requests are about WARM_UP / seconds as many again.
        requests = len(result.latencies) * (1 + WARM_UP / seconds)
        found[f"{name}, {who}: p50 ms"] = 1000 * result.percentile(0.5)
        found[f"{name}, {who}: p99 ms"] = 1000 * result.percentile(0.99)
        found[f"{name}, {who}: requests/s"] = result.per_second
        found[f"{name}, {who}: worker's CPU ms"] = 1000 * (sum(worker.cpu_times()[:2]) - before) / requests
    for name, process in processes(server).items():
        found[f"memory of the {name}: MB"] = process.memory_info().rss / 1e6
    return found


TARGETS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "status, 1 client: p50 ms": ("< 5", lambda value: value < 5),
    "status, 16 clients: requests/s": (">= 800", lambda value: value >= 800),
    "memory of the API worker: MB": ("< 200", lambda value: value < 200),
    "watch latency: max s": ("< 1", lambda value: value < 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000, help="in the large store")
    parser.add_argument("--events", type=int, default=1_000_000, help="in the large store")
    parser.add_argument("--small", type=int, default=100, help="jobs in the small store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    arguments = parser.parse_args()
    sizes = (arguments.small, arguments.jobs)
    console = Console()
    rounds: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = Path(folder) / "models"
        (models / MODEL).mkdir(parents=True)
        (models / MODEL / "config.json").write_text('{"model_type": "llama"}')
        trainer = Path(folder) / "trainer.py"
        trainer.write_text(TRAINER.format(steps=WATCHED_STEPS))
        environment = {"TRL_TRAINER_COMMAND": shlex.join([sys.executable, str(trainer)])}
        servers = {}
        for size in sizes:
            where = Path(folder) / str(size)
            start = time.perf_counter()
            seeded = seed(where / "trl", jobs=size, events=arguments.events * size // arguments.jobs)
            console.print(f"{size} jobs seeded in {time.perf_counter() - start:.1f} s", highlight=False)
            server = stack.enter_context(bento_server(where, models=models, environment=environment))
            servers[size] = (server, seeded)
        for _ in range(arguments.rounds):
            for size in sizes:
                rounds[size].append(measure(*servers[size], seconds=arguments.seconds))
        for size in sizes:
            latencies = watch_latencies(servers[size][0])
            for found in rounds[size]:
                found["watch latency: p50 s"] = statistics.median(latencies)
                found["watch latency: max s"] = max(latencies)
    for size in sizes:
        per_second = claims_per_second(size)
        for found in rounds[size]:
            found["claim and finish on the store: jobs/s"] = per_second
    medians = {
        size: {name: statistics.median(found[name] for found in rounds[size]) for name in rounds[size][0]}
        for size in sizes
    }
    table = Table(title=f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    table.add_column("")
    for size in sizes:
        table.add_column(f"{size} jobs", justify="right")
    table.add_column("target", justify="right")
    missed = []
    for name in medians[sizes[0]]:
        target, holds = TARGETS.get(name, ("", lambda value: True))
        if not all(holds(medians[size][name]) for size in sizes):
            missed.append(name)
        mark = "" if not target else " missed" if name in missed else " met"
        table.add_row(name, *(f"{medians[size][name]:.3g}" for size in sizes), target + mark)
    growth = medians[sizes[1]]["status, 1 client: p50 ms"] / medians[sizes[0]]["status, 1 client: p50 ms"]
    if growth > 1.2:
        missed.append("growth")
    table.add_row(
        "status p50, large / small store", "", f"{growth:.2f}", "<= 1.2" + (" missed" if growth > 1.2 else " met")
    )
    console.print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
