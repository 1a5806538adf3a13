"""kill -9 of anything at any boundary of a job's life: one end, nothing lost, doubled or left behind."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from bento_service.jobs.job import JobStatus
from bento_service.jobs.launcher import is_alive
from bento_service.jobs.store import Store
from tests.bento_server import bento_server
from tests.job_factory import make_file, make_job

SCRIPTED = Path(__file__).parents[1] / "scripted_trainer.py"
STEPS = 6
DEADLINE = 90
ENVIRONMENT = {
    "TRL_TRAINER_COMMAND": f"{sys.executable} {SCRIPTED}",
    "TRL_POLL_SECONDS": "0.05",
    "TRL_HEARTBEAT_SECONDS": "0.5",
    "TRL_LEASE_SECONDS": "20",
    "TRL_RETRY_BACKOFF_SECONDS": "0.05",
    "TRL_MAX_ATTEMPTS": "4",
}
WORDS = {"worker": "_bentoml_impl.worker.service", "supervisor": "bento_service.jobs", "trainer": str(SCRIPTED)}

# Where in the job's life the kill comes. The scripted trainer waits there until it is released.
BOUNDARIES = ["queued", "launched", "running", "ending", "cancelling", "pausing"]
VICTIMS = ["worker", "supervisor", "trainer", "arbiter"]
CASES = [
    (boundary, victim) for boundary in BOUNDARIES for victim in VICTIMS if (boundary, victim) != ("queued", "trainer")
]


class Service:
    """A real service that can be killed in parts, and started again on the same state."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start()
        self.store = Store.open(f"sqlite:///{self.server.home / 'trl-remote.db'}")

    def start(self) -> None:
        self._context = bento_server(self.directory, environment=ENVIRONMENT)
        self.server = self._context.__enter__()

    def stop(self) -> None:
        self._context.__exit__(None, None, None)

    def processes(self, role: str) -> list[psutil.Process]:
        """All living processes of a role that belong to this service, its children or not."""
        if role == "arbiter":
            return [psutil.Process(self.server.process.pid)]
        return [process for process in psutil.process_iter() if self._is(process, role)]

    def _is(self, process: psutil.Process, role: str) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or WORDS[role] not in process.cmdline():
                return False
            if role == "trainer":
                return any(part.startswith(str(self.server.home)) for part in process.cmdline())
            return process.environ().get("TRL_HOME") == str(self.server.home)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def kill(self, role: str) -> None:
        for process in self.processes(role):
            process.kill()
        if role == "arbiter":
            self.server.process.wait()
            for left in ("worker", "supervisor", "trainer"):
                wait(lambda left=left: not self.processes(left), f"a {left} outlived its arbiter")
            self.stop()
            self.start()

    def submit(self, **script: object) -> str:
        """Queue a job whose trainer follows ``script``; committed when this returns, as after a 2xx."""
        job = make_job(self.store.add_file(make_file()).id)
        folder = self.server.home / "runs" / job.id
        folder.mkdir(parents=True)
        (folder / "script.json").write_text(json.dumps({"steps": STEPS, "step_seconds": 0.01, **script}))
        self.store.create_job(job)
        return job.id

    def run(self, job_id: str) -> Path:
        return self.server.home / "runs" / job_id

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.server.url}/readyz", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False


def wait(condition, message, seconds=DEADLINE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("chaos"))
    yield service
    service.store.close()
    service.stop()


def assert_whole(service, job_id):
    """What must hold after any kill: legal history without gaps, each step once, no second trainer."""
    events = service.store.list_events(job_id, order="asc", limit=10000).data
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    steps = [e.data["step"] for e in events if e.type == "metrics"]
    assert steps == list(range(1, len(steps) + 1))
    states = [e.data for e in events if e.type == "state"]
    assert [s["to"] for s in states[:-1]] == [s["from"] for s in states[1:]]
    assert len([s for s in states if JobStatus(s["to"]).is_terminal]) == 1
    assert not (service.run(job_id) / "second-trainer").exists()
    for attempt in service.store.list_attempts(job_id):
        assert attempt.ended_at is not None
        assert attempt.pid is None or not is_alive(attempt.pid, attempt.pid_created_at)
    return steps


@pytest.mark.parametrize(("boundary", "victim"), CASES, ids=[f"{b}-{v}" for b, v in CASES])
def test_a_kill(service, boundary, victim):
    wait(service.answers, service.server.log())
    held = {
        "launched": "start",
        "running": random.Random(f"{boundary} {victim}").randrange(1, STEPS),
        "ending": "outcome",
    }
    blocker = None
    if boundary == "queued":
        blocker = service.submit(hold=1)
        wait((service.run(blocker) / "held").exists, service.server.log())
    job_id = service.submit(hold=held.get(boundary, 2))
    store = service.store
    if boundary != "queued":
        wait((service.run(job_id) / "held").exists, service.server.log())
    if boundary == "cancelling":
        store.request_stop(job_id, "cancel")
    if boundary == "pausing":
        store.request_stop(job_id, "pause")

    service.kill(victim)

    for release in filter(None, (blocker, job_id)):
        (service.run(release) / "release").touch()
    if boundary == "pausing":
        settled = {JobStatus.PAUSED, JobStatus.SUCCEEDED}
        wait(lambda: store.get_job(job_id).status in settled, service.server.log())
        if store.get_job(job_id).status is JobStatus.PAUSED:
            store.resume(job_id)
    wait(lambda: store.get_job(job_id).status.is_terminal, service.server.log())
    wait(service.answers, service.server.log())
    status = store.get_job(job_id).status
    steps = assert_whole(service, job_id)
    if boundary == "cancelling":
        # The kill may come when the supervisor had not heard of the cancel, and the trainer was at its end.
        assert status in (JobStatus.CANCELLED, JobStatus.SUCCEEDED)
    else:
        assert status is JobStatus.SUCCEEDED
        assert steps == list(range(1, STEPS + 1))
    if blocker is not None:
        wait(lambda: store.get_job(blocker).status.is_terminal, service.server.log())
        assert_whole(service, blocker)
    assert service.processes("trainer") == []
    assert len(service.processes("supervisor")) == 1


def test_a_stop_in_the_middle_drains_and_the_next_start_finishes(service):
    wait(service.answers, service.server.log())
    job_id = service.submit(hold=3)
    wait((service.run(job_id) / "held").exists, service.server.log())
    os.kill(service.server.process.pid, signal.SIGTERM)
    assert service.server.process.wait(60) == 0
    assert service.processes("trainer") == service.processes("supervisor") == []
    assert service.store.get_job(job_id).status is JobStatus.QUEUED
    service.stop()
    service.start()
    wait(lambda: service.store.get_job(job_id).status.is_terminal, service.server.log())
    assert assert_whole(service, job_id) == list(range(1, STEPS + 1))
    assert service.store.failures(job_id) == 0


def test_an_unreadable_run_directory_never_stops_the_start(service):
    wait(service.answers, service.server.log())
    broken = service.submit(hold=2)
    wait((service.run(broken) / "held").exists, service.server.log())
    service.kill("supervisor")
    service.kill("trainer")
    events = service.run(broken) / "events.jsonl"
    with events.open("ab") as file:
        file.write(b"\xff\xfe not json\n")
    healthy = service.submit()
    wait(lambda: service.store.get_job(healthy).status is JobStatus.SUCCEEDED, service.server.log())
    wait(lambda: service.store.get_job(broken).status is JobStatus.FAILED, service.server.log())
    error = service.store.get_job(broken).error
    assert error.code == "run_directory_unreadable" and "events.jsonl" in error.message
