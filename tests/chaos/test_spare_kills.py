"""kill -9 around a spare trainer: its job runs in the same attempt, and no spare is left behind.

The spare is the scripted trainer, started by the supervisor's own code; the one that is killed with its supervisor
process is the real one, in the middle of its imports.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bento_service.jobs.devices import Devices
from bento_service.jobs.job import JobStatus
from bento_service.jobs.launcher import SpareTrainer, is_alive, trainer_environment
from bento_service.jobs.spares import SpareTrainers
from bento_service.jobs.store import Store
from bento_service.jobs.supervisor import Supervisor
from bento_service.settings import Settings
from tests.job_factory import submit

SCRIPTED = [sys.executable, str(Path(__file__).parents[1] / "scripted_trainer.py")]


@pytest.fixture
def settings(tmp_path):
    return Settings(
        home=tmp_path / "home",
        trainer_command=" ".join(SCRIPTED),  # of cold starts; the spares' is in ``supervise``
        retry_backoff_seconds=0.01,
        heartbeat_seconds=0.2,
        lease_seconds=6,
        device="cpu",
    )


@pytest.fixture
def store(settings):
    store = Store.open(settings.sqlalchemy_url)
    yield store
    store.close()


def supervise(settings, store, *, slots=1):
    supervisor = Supervisor(settings, store, devices=Devices("cpu", tuple(map(str, range(slots)))))
    supervisor.spares = SpareTrainers(2, trainer_environment([], "cpu"), command=SCRIPTED, retry_seconds=0)
    return supervisor


@pytest.fixture
def supervisor(settings, store):
    supervisor = supervise(settings, store)
    yield supervisor
    supervisor.spares.close()
    for run in supervisor.runs.values():
        run.trainer.kill()


def wait(condition, step=lambda: None, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        step()
        time.sleep(0.01)


def spare_of(supervisor):
    """The pid of the spare that will take the next job."""
    wait(lambda: supervisor.spares.waiting and supervisor.spares.waiting[0].is_listening(), supervisor.step)
    return supervisor.spares.waiting[0].pid


def waiting(supervisor):
    return [spare.pid for spare in supervisor.spares.waiting]


def run_to_end(supervisor, job):
    wait(lambda: supervisor.store.get_job(job.id).status.is_terminal, supervisor.step)
    assert supervisor.store.get_job(job.id).status is JobStatus.SUCCEEDED
    events = supervisor.store.list_events(job.id, order="asc", limit=1000).data
    assert [event.data["step"] for event in events if event.type == "metrics"] == [1, 2, 3]
    return supervisor.store.list_attempts(job.id)


def threads_of(pid):
    """proc(5), stat: the third field, after the name in brackets, is the state; T is stopped."""
    return Path(f"/proc/{pid}/task").glob("*/stat")


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_job_runs_in_the_spare_and_leaves_another(supervisor, store):
    pid = spare_of(supervisor)
    job = submit(store)
    (attempt,) = run_to_end(supervisor, job)
    assert (attempt.pid, attempt.exit_code) == (pid, 0)
    assert spare_of(supervisor) != pid
    log = (supervisor.settings.runs_path / job.id / "trainer.log").read_text()
    assert "attempt 1 from step 0" in log and "PYTORCH_NVML" not in log


def test_a_spare_killed_while_it_waits_is_replaced(supervisor, store):
    pid = spare_of(supervisor)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: is_gone(pid))
    wait(lambda: waiting(supervisor) and pid not in waiting(supervisor), supervisor.step)
    assert len(run_to_end(supervisor, submit(store))) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_spare_that_dies_or_hangs_at_the_hand_over_costs_no_attempt(supervisor, store, monkeypatch, number):
    pid = spare_of(supervisor)
    record, recorded = store.launched, []

    def launched(lease, **about):
        record(lease, **about)
        recorded.append(about["pid"])
        if about["pid"] == pid:
            os.kill(pid, number)
            if number == signal.SIGSTOP:  # a thread at a time: the one that listens may be the last
                wait(lambda: {thread.read_text().rpartition(")")[2].split()[0] for thread in threads_of(pid)} == {"T"})

    monkeypatch.setattr(store, "launched", launched)
    job = submit(store)
    (attempt,) = run_to_end(supervisor, job)
    assert recorded == [pid, attempt.pid]
    assert store.failures(job.id) == 0
    assert is_gone(pid)
    assert not (supervisor.settings.runs_path / job.id / "second-trainer").exists()


def test_a_supervisor_that_dies_at_the_hand_over_leaves_no_spare(supervisor, settings, store, monkeypatch):
    pid = spare_of(supervisor)

    def die(spare, orders, *, within):
        spare._channel.close()  # as the kernel does
        raise KeyboardInterrupt

    monkeypatch.setattr(SpareTrainer, "take", die)
    job = submit(store)
    with pytest.raises(KeyboardInterrupt):
        wait(lambda: False, supervisor.step)
    wait(lambda: is_gone(pid))
    second = Supervisor(settings, store, devices=Devices("cpu", ("0",)))
    second.reconcile()
    first, again = run_to_end(second, job)
    assert first.pid == pid != again.pid


def test_the_next_supervisor_adopts_a_trainer_that_was_a_spare(supervisor, settings, store):
    pid = spare_of(supervisor)
    job = submit(store)
    folder = settings.runs_path / job.id
    folder.mkdir(parents=True)
    (folder / "script.json").write_text(json.dumps({"hold": 2}))
    wait((folder / "held").exists, supervisor.step)
    supervisor.runs.clear()
    second = Supervisor(settings, store, devices=Devices("cpu", ("0",)))
    second.reconcile()
    assert second.runs[job.id].trainer.pid == pid and second.runs[job.id].trainer.poll() is None
    (folder / "release").touch()
    (attempt,) = run_to_end(second, job)
    assert not is_alive(attempt.pid, attempt.pid_created_at)


def test_never_more_spares_than_free_devices_and_one_and_none_while_a_job_loads(settings, store):
    supervisor = supervise(settings, store)
    jobs = [submit(store), submit(store)]
    for job in jobs:
        folder = settings.runs_path / job.id
        folder.mkdir(parents=True)
        (folder / "script.json").write_text(json.dumps({"hold": "start"}))
    held, release = settings.runs_path / jobs[0].id / "held", settings.runs_path / jobs[0].id / "release"
    try:
        wait(held.exists, supervisor.step)
        for _ in range(5):
            supervisor.step()
        assert waiting(supervisor) == []
        (settings.runs_path / jobs[0].id / "script.json").write_text("{}")
        release.touch()
        wait(lambda: len(waiting(supervisor)) == 1, supervisor.step)
        (settings.runs_path / jobs[1].id / "release").touch()
        wait(lambda: len(waiting(supervisor)) == 2, supervisor.step)  # the slot is free
        supervisor.drain()
        assert waiting(supervisor) == []
    finally:
        supervisor.spares.close()
        for run in supervisor.runs.values():
            run.trainer.kill()


def test_a_supervisor_killed_takes_its_spare_along(settings):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TRL_")},
        "TRL_HOME": str(settings.home),
        "TRL_DEVICE": "cpu",
        "TRL_POLL_SECONDS": "0.05",
    }
    process = subprocess.Popen([sys.executable, "-m", "bento_service.jobs"], stdin=subprocess.PIPE, env=environment)
    try:
        supervisor = psutil.Process(process.pid)
        wait(lambda: any("--spare" in child.cmdline() for child in supervisor.children()))
        (spare,) = supervisor.children()
        process.kill()
        wait(lambda: is_gone(spare.pid))
    finally:
        process.kill()
        process.wait()
