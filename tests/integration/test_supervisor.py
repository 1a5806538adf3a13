"""The supervisor with real processes: what ends how, and nothing left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bento_service.jobs import result_files
from bento_service.jobs.devices import Devices
from bento_service.jobs.host_lock import supervisor_pid
from bento_service.jobs.job import JobStatus, Lease
from bento_service.jobs.launcher import is_alive, trainer_environment
from bento_service.jobs.store import LeaseLost, Store
from bento_service.jobs.supervisor import Supervisor
from bento_service.settings import Settings
from bento_service.training.lease import EXIT_STATUS
from tests.job_factory import make_file, make_job, submit

SCRIPTED = f"{sys.executable} {Path(__file__).parents[1] / 'scripted_trainer.py'}"


@pytest.fixture
def settings(tmp_path):
    return Settings(
        home=tmp_path / "home",
        trainer_command=SCRIPTED,
        grace_seconds=5,
        retry_backoff_seconds=0.01,
        max_attempts=3,
        heartbeat_seconds=0.2,
        lease_seconds=5,
        device="cpu",
    )


@pytest.fixture
def store(settings):
    store = Store.open(settings.sqlalchemy_url)
    yield store
    store.close()


@pytest.fixture
def supervisor(settings, store):
    supervisor = Supervisor(settings, store, devices=Devices("cpu", ("0",)))
    yield supervisor
    for run in supervisor.runs.values():
        run.trainer.kill()


def script(settings, job, **values):
    folder = settings.runs_path / job.id
    folder.mkdir(parents=True)
    (folder / "script.json").write_text(json.dumps(values))


def drive(supervisor, condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the supervisor did not get there in time"
        supervisor.step()
        time.sleep(0.01)


def drive_to_end(supervisor, job_id):
    drive(supervisor, lambda: supervisor.store.get_job(job_id).status.is_terminal)
    return supervisor.store.get_job(job_id)


def drive_to_step(supervisor, job_id, step=1):
    drive(supervisor, lambda: supervisor.store.get_job(job_id).progress.step >= step)
    return supervisor.runs[job_id].trainer


def steps(store, job_id):
    found = store.list_events(job_id, order="asc", limit=5000).data
    assert [e.seq for e in found] == list(range(1, len(found) + 1))
    return [e.data["step"] for e in found if e.type == "metrics"]


def test_a_job_runs_to_its_end(supervisor, store):
    job = submit(store)
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert steps(store, job.id) == [1, 2, 3]
    assert (done.progress.step, done.progress.metrics["loss"]) == (3, 1 / 3)
    (attempt,) = store.list_attempts(job.id)
    assert attempt.exit_code == 0 and attempt.ended_at is not None
    assert supervisor.runs == {}


def test_a_finished_job_waits_for_room_for_its_result_files_and_says_so(supervisor, store, monkeypatch):
    publish, refused = result_files.publish, []

    def refuse(*arguments):
        refused.append(time.monotonic())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(result_files, "publish", refuse)
    job = submit(store)
    drive(supervisor, lambda: len(refused) >= 3)
    waiting = store.get_job(job.id)
    assert (waiting.status, waiting.result_files) == (JobStatus.RUNNING, [])
    told = [event for event in store.list_events(job.id).data if "No space left" in event.message]
    assert [event.level for event in told] == ["warn"]
    assert refused[2] - refused[1] >= supervisor.settings.heartbeat_seconds
    monkeypatch.setattr(result_files, "publish", publish)
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert [store.get_file(file_id).bytes > 0 for file_id in done.result_files] == [True, True]


def test_a_users_error_fails_at_once(supervisor, settings, store):
    job = submit(store)
    script(settings, job, ends="failed")
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.FAILED
    assert (done.error.code, done.error.message) == ("scripted", "as told")
    assert len(store.list_attempts(job.id)) == 1


def test_a_killed_trainer_is_retried_and_loses_no_event(supervisor, settings, store):
    job = submit(store)
    script(settings, job, crashes=2)
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert steps(store, job.id) == [1, 2, 3]
    assert [a.signal for a in store.list_attempts(job.id)] == [signal.SIGKILL, signal.SIGKILL, None]


def test_a_trainer_that_always_dies_fails_with_the_logs_tail(supervisor, settings, store):
    job = submit(store)
    script(settings, job, crashes=99)
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.FAILED
    assert done.error.code == "trainer_died"
    assert "SIGKILL" in done.error.message and "about to crash" in done.error.message
    assert len(store.list_attempts(job.id)) == 3


def test_cancel_while_running(supervisor, settings, store):
    job = submit(store)
    script(settings, job, ends="hang")
    trainer = drive_to_step(supervisor, job.id)
    store.request_stop(job.id, "cancel")
    assert drive_to_end(supervisor, job.id).status is JobStatus.CANCELLED
    assert not is_alive(trainer.pid, trainer.created_at)


def test_a_trainer_that_ignores_sigterm_is_killed_after_the_grace_period(settings, store):
    supervisor = Supervisor(settings.model_copy(update={"grace_seconds": 0.3}), store)
    job = submit(store)
    script(settings, job, ends="hang", ignore_sigterm=True)
    trainer = drive_to_step(supervisor, job.id)
    store.request_stop(job.id, "cancel")
    assert drive_to_end(supervisor, job.id).status is JobStatus.CANCELLED
    assert not is_alive(trainer.pid, trainer.created_at)
    assert store.list_attempts(job.id)[0].signal == signal.SIGKILL


def test_pause_frees_the_device_and_resume_continues(supervisor, settings, store):
    job, other = submit(store), submit(store)
    script(settings, job, steps=50, step_seconds=0.05)
    drive_to_step(supervisor, job.id, 2)
    store.request_stop(job.id, "pause")
    assert drive_to_end(supervisor, other.id).status is JobStatus.SUCCEEDED
    assert store.get_job(job.id).status is JobStatus.PAUSED
    (settings.runs_path / job.id / "script.json").write_text(json.dumps({"steps": 50}))
    store.resume(job.id)
    assert drive_to_end(supervisor, job.id).status is JobStatus.SUCCEEDED
    assert steps(store, job.id) == list(range(1, 51))


def test_drain_queues_again_without_counting_a_failure(supervisor, settings, store):
    job = submit(store)
    script(settings, job, ends="hang")
    drive_to_step(supervisor, job.id)
    supervisor.drain()
    drive(supervisor, lambda: not supervisor.runs)
    assert store.get_job(job.id).status is JobStatus.QUEUED
    assert store.failures(job.id) == 0


def test_a_second_supervisor_adopts_the_living_trainer(supervisor, settings, store):
    job = submit(store)
    script(settings, job, steps=1000, step_seconds=0.01)
    trainer = drive_to_step(supervisor, job.id, 5)
    second = Supervisor(settings, store)
    second.reconcile()
    assert second.runs[job.id].trainer.pid == trainer.pid
    supervisor.runs.clear()  # the first one has died
    (settings.runs_path / job.id / "script.json").unlink()
    drive_to_step(second, job.id, 10)
    store.request_stop(job.id, "cancel")
    assert drive_to_end(second, job.id).status is JobStatus.CANCELLED
    assert len(store.list_attempts(job.id)) == 1
    steps(store, job.id)


def test_a_trainer_that_died_unseen_is_retried(supervisor, settings, store):
    job = submit(store)
    script(settings, job, steps=1000, step_seconds=0.01)
    trainer = drive_to_step(supervisor, job.id, 2)
    os.killpg(trainer.pid, signal.SIGKILL)
    psutil.Process(trainer.pid).wait(10)
    (settings.runs_path / job.id / "script.json").write_text(json.dumps({"steps": 1000}))
    second = Supervisor(settings, store)
    second.reconcile()
    assert drive_to_end(second, job.id).status is JobStatus.SUCCEEDED
    assert steps(store, job.id) == list(range(1, 1001))
    assert len(store.list_attempts(job.id)) == 2


def test_a_supervisor_that_lost_its_lease_ends_its_trainer(supervisor, settings, store):
    job = submit(store)
    script(settings, job, ends="hang")
    trainer = drive_to_step(supervisor, job.id)
    token = store.get_job(job.id).lease_token
    lease = store.adopt(job.id, "other", lease_seconds=60, from_token=token)
    drive(supervisor, lambda: job.id not in supervisor.runs)
    psutil.wait_procs([psutil.Process(trainer.pid)] if psutil.pid_exists(trainer.pid) else [], timeout=10)
    assert not is_alive(trainer.pid, trainer.created_at)
    store.heartbeat(lease, lease_seconds=1)
    with pytest.raises(LeaseLost):
        store.heartbeat(Lease(job_id=job.id, token=token), lease_seconds=1)


def test_a_job_over_its_run_time_fails_and_says_so(supervisor, settings, store):
    job = submit(store, options={"max_run_seconds": 0.5})
    script(settings, job, ends="hang")
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.FAILED
    assert done.error.code == "run_time_exceeded" and "0.5 s" in done.error.message


def test_an_idle_trainer_is_reported_then_stopped_and_retried(settings, store):
    changes = {"idle_warn_seconds": 0.2, "idle_stop_seconds": 0.5, "max_attempts": 2}
    supervisor = Supervisor(settings.model_copy(update=changes), store)
    job = submit(store)
    script(settings, job, ends="hang")
    done = drive_to_end(supervisor, job.id)
    assert done.status is JobStatus.FAILED and "no progress" in done.error.message
    assert len(store.list_attempts(job.id)) == 2
    found = store.list_events(job.id, order="asc", limit=100).data
    assert len([e for e in found if "No progress" in e.message and e.level == "warn"]) >= 2


def test_a_job_that_does_not_fit_on_the_disk_is_paused_with_both_numbers(supervisor, store, tmp_path):
    header = json.dumps({"w.weight": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    job = make_job(options={"tuning": "full"})
    file = store.add_file(make_file())
    request = replace(job.request, training_file=file.id)
    spec = job.spec.model_copy(update={"model_path": str(tmp_path)})
    job, _ = store.create_job(replace(job, request=request, spec=spec))
    drive(supervisor, lambda: store.get_job(job.id).status is JobStatus.PAUSED)
    last = store.list_events(job.id).data[0]
    assert "48000000.07 GB" in last.message and "are free" in last.message
    assert not (supervisor.settings.runs_path / job.id).exists()


def test_a_trainer_whose_supervisor_is_gone_ends_before_its_lease_does(settings, store):
    supervisor = Supervisor(settings.model_copy(update={"lease_seconds": 2}), store)
    job = submit(store)
    script(settings, job, ends="hang", ignore_sigterm=True)
    trainer = drive_to_step(supervisor, job.id)
    wait_for(lambda: trainer.poll() is not None)
    assert trainer.poll().code == EXIT_STATUS


def test_a_trainer_whose_supervisor_is_gone_saves_first(settings, store):
    supervisor = Supervisor(settings.model_copy(update={"lease_seconds": 3}), store)
    job = submit(store)
    script(settings, job, ends="hang")
    trainer = drive_to_step(supervisor, job.id)
    wait_for(lambda: trainer.poll() is not None)
    assert supervisor.runs[job.id].directory.read_outcome(1).status == "stopped"


def test_a_stale_job_of_a_lost_host_is_taken_over(settings, store):
    job = submit(store)
    store.claim("other", host="lost-host", free_devices=1, lease_seconds=0.01)
    supervisor = Supervisor(settings, store)
    supervisor.reconcile()
    assert supervisor.runs == {}
    assert drive_to_end(supervisor, job.id).status is JobStatus.SUCCEEDED
    assert [a.host for a in store.list_attempts(job.id)] == ["lost-host", supervisor.host]
    assert steps(store, job.id) == [1, 2, 3]


def test_each_running_job_has_devices_of_its_own(settings, store):
    supervisor = Supervisor(settings, store, devices=Devices("cuda", ("0", "1", "GPU-2")))
    two, one, waits = submit(store, options={"devices": 2}), submit(store), submit(store)
    for job in (two, one, waits):
        script(settings, job, ends="hang")
    drive(supervisor, lambda: all(store.get_job(job.id).progress.step == 3 for job in (two, one)))
    assert store.get_job(waits.id).status is JobStatus.QUEUED
    logs = {job.id: "\n".join(supervisor.runs[job.id].directory.log_tail()) for job in (two, one)}
    assert "CUDA_VISIBLE_DEVICES=0,1\n" in logs[two.id]
    assert "CUDA_VISIBLE_DEVICES=GPU-2\n" in logs[one.id]
    store.request_stop(one.id, "cancel")
    drive(supervisor, lambda: store.get_job(waits.id).progress.step == 3)
    assert supervisor.runs[waits.id].devices == ("GPU-2",)
    for job in (two, waits):
        store.request_stop(job.id, "cancel")
        drive_to_end(supervisor, job.id)


def test_a_flood_of_output_neither_blocks_the_trainer_nor_fills_the_disk(settings, store):
    supervisor = Supervisor(settings.model_copy(update={"max_log_bytes": 5 * 2**20}), store)
    job = submit(store)
    script(settings, job, megabytes_of_noise=100)
    drive_to_step(supervisor, job.id)
    folder = settings.runs_path / job.id
    assert drive_to_end(supervisor, job.id).status is JobStatus.SUCCEEDED
    assert (folder / "trainer.log.1").stat().st_size == 5 * 2**20
    assert (folder / "trainer.log").stat().st_size <= 5 * 2**20


def test_a_trainers_environment_holds_no_secrets(supervisor, store, monkeypatch):
    secrets = {"TRL_API_KEYS": "k", "TRL_DATABASE_URL": "postgresql://u:p@h/d", "AWS_SECRET_ACCESS_KEY": "s"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    job = submit(store)
    drive_to_end(supervisor, job.id)
    log = (supervisor.settings.runs_path / job.id / "trainer.log").read_text()
    assert "'PATH'" in log
    assert [name for name in secrets if name in log] == []


def test_a_trainer_without_go_ends(settings, tmp_path):
    """A supervisor killed between starting and recording a trainer leaves none."""
    trainer = subprocess.Popen(
        [*SCRIPTED.split(), str(tmp_path), "--attempt", "1", "--await-go"],
        stdin=subprocess.PIPE,
        env=trainer_environment([], "cpu"),
    )
    trainer.stdin.close()
    assert trainer.wait(20) == 0
    assert list(tmp_path.iterdir()) == []


def run_supervisor(settings):
    environment = {
        **os.environ,
        "TRL_HOME": str(settings.home),
        "TRL_TRAINER_COMMAND": SCRIPTED,
        "TRL_DEVICE": "cpu",
        "TRL_POLL_SECONDS": "0.05",
    }
    return subprocess.Popen([sys.executable, "-m", "bento_service.jobs"], stdin=subprocess.PIPE, env=environment)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_the_process_drains_on_sigterm(settings, store):
    job = submit(store)
    script(settings, job, ends="hang")
    process = run_supervisor(settings)
    try:
        wait_for(lambda: store.get_job(job.id).progress.step == 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert store.get_job(job.id).status is JobStatus.QUEUED
    (attempt,) = store.list_attempts(job.id)
    assert not is_alive(attempt.pid, attempt.pid_created_at)


def test_when_its_parent_dies_trainers_are_handed_over_and_one_supervisor_works(settings, store):
    job = submit(store)
    script(settings, job, steps=100000, step_seconds=0.02)
    first, second = run_supervisor(settings), None
    try:
        wait_for(lambda: store.get_job(job.id).progress.step >= 2)
        second = run_supervisor(settings)
        pid = supervisor_pid(settings)
        assert pid == first.pid
        first.stdin.close()
        assert first.wait(20) == 0
        wait_for(lambda: supervisor_pid(settings) == second.pid)
        (attempt,) = store.list_attempts(job.id)
        assert is_alive(attempt.pid, attempt.pid_created_at)
        store.request_stop(job.id, "cancel")
        wait_for(lambda: store.get_job(job.id).status is JobStatus.CANCELLED)
        assert not is_alive(attempt.pid, attempt.pid_created_at)
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()
