"""Two hosts on one PostgreSQL: a supervisor that was stopped past its lease writes nothing when it comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bento_service.jobs.job import JobStatus
from bento_service.jobs.launcher import is_alive
from bento_service.jobs.store import Store
from bento_service.settings import Settings
from tests.job_factory import make_file, make_job

SCRIPTED = Path(__file__).parents[1] / "scripted_trainer.py"
LEASE_SECONDS = 3


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path, postgresql_database):
    (tmp_path / "shared").mkdir()
    return Settings(home=tmp_path / "shared", database_url=postgresql_database)


@pytest.fixture
def store(settings):
    store = Store.open(settings.sqlalchemy_url)
    yield store
    store.close()


@pytest.fixture
def start(settings):
    """Starts a supervisor that believes to be on the named host."""
    started = []

    def start(host):
        environment = {
            **os.environ,
            "TRL_HOME": str(settings.home),
            "TRL_DATABASE_URL": settings.sqlalchemy_url,
            "TRL_HOST_NAME": host,
            "TRL_DEVICE": "cpu",
            "TRL_TRAINER_COMMAND": f"{sys.executable} {SCRIPTED}",
            "TRL_POLL_SECONDS": "0.05",
            "TRL_HEARTBEAT_SECONDS": "0.5",
            "TRL_LEASE_SECONDS": str(LEASE_SECONDS),
            "TRL_RETRY_BACKOFF_SECONDS": "0",
        }
        log = (settings.home / f"{host}.log").open("wb")
        command = [sys.executable, "-m", "bento_service.jobs"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def submit(settings, store, **script):
    job = make_job(store.add_file(make_file()).id)
    folder = settings.runs_path / job.id
    folder.mkdir(parents=True)
    (folder / "script.json").write_text(json.dumps(script))
    store.create_job(job)
    return job.id


def test_a_supervisor_stopped_past_its_lease_is_replaced_and_refused(settings, store, start):
    job_id = submit(settings, store, steps=4, hold=2)
    first = start("first")
    wait((settings.runs_path / job_id / "held").exists)
    (attempt,) = store.list_attempts(job_id)
    os.kill(first.pid, signal.SIGSTOP)
    # The trainer of the sleeping supervisor ends by itself, before its lease does.
    wait(lambda: not is_alive(attempt.pid, attempt.pid_created_at))
    start("second")
    wait(lambda: store.get_job(job_id).status is JobStatus.SUCCEEDED)
    events = store.list_events(job_id, order="asc", limit=1000).data
    os.kill(first.pid, signal.SIGCONT)
    log = settings.home / "first.log"
    wait(lambda: "lease lost" in log.read_text())
    assert first.poll() is None
    assert store.list_events(job_id, order="asc", limit=1000).data == events
    assert [e.data["step"] for e in events if e.type == "metrics"] == [1, 2, 3, 4]
    assert [a.host for a in store.list_attempts(job_id)] == ["first", "second"]
    assert not (settings.runs_path / job_id / "second-trainer").exists()


def test_two_hosts_share_a_queue_and_run_each_job_once(settings, store, start):
    jobs = [submit(settings, store, steps=3, step_seconds=0.02) for _ in range(12)]
    supervisors = [start("first"), start("second")]
    wait(lambda: all(store.get_job(job).status is JobStatus.SUCCEEDED for job in jobs))
    attempts = [store.list_attempts(job) for job in jobs]
    assert [len(a) for a in attempts] == [1] * 12
    assert {a[0].host for a in attempts} == {"first", "second"}
    assert not list(settings.runs_path.glob("*/second-trainer"))
    for process in supervisors:
        process.terminate()
        assert process.wait(30) == 0
