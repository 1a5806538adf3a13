"""Old artifacts go, live ones never."""

import pytest

from bento_service.jobs.job import JobError, JobStatus, Lease
from bento_service.jobs.retention import expire
from bento_service.settings import Settings
from bento_service.training.events import TrainerEvent
from tests.job_factory import submit


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path, retention_days=0)


def run_folder(settings, job):
    folder = settings.runs_path / job.id
    folder.mkdir(parents=True)
    return folder


def finished(store):
    submit(store)
    job = store.claim("a", host="h", free_devices=1, lease_seconds=30)
    lease = Lease(job_id=job.id, token=job.lease_token)
    saved = {"step": 2, "epoch": 0.5, "path": "/c/2", "bytes": 7, "final": True}
    store.record(lease, [TrainerEvent(seq=1, time=1.0, type="checkpoint", message="saved", data=saved)], offset=9)
    return store.finish(lease, JobStatus.FAILED, "over", error=JobError(code="x", message="y"))


def test_ended_jobs_lose_their_folder_and_checkpoints_once_and_keep_their_history(settings, store):
    job = finished(store)
    folder = run_folder(settings, job)
    assert expire(settings, store) == [job.id]
    assert not folder.exists()
    assert store.list_checkpoints(job.id).data == []
    assert store.get_job(job.id).status is JobStatus.FAILED
    assert "retention" in store.list_events(job.id).data[0].message
    assert expire(settings, store) == []


def test_jobs_that_have_not_ended_keep_everything(settings, store):
    waiting, paused = submit(store), submit(store)
    store.request_stop(paused.id, "pause")
    running = store.claim("a", host="h", free_devices=1, lease_seconds=30)
    assert running.id == waiting.id
    folders = [run_folder(settings, job) for job in (paused, running)]
    assert expire(settings, store) == []
    assert all(folder.exists() for folder in folders)


def test_nothing_goes_before_its_time_or_without_being_asked(settings, store):
    job = finished(store)
    folder = run_folder(settings, job)
    assert expire(settings.model_copy(update={"retention_days": 1}), store) == []
    assert expire(settings.model_copy(update={"retention_days": None}), store) == []
    assert folder.exists()
