"""The store keeps its promises: idempotent submits, allowed transitions only, fenced writes, exact paging."""

import threading

import pytest

from bento_service.errors import ClientIdConflict, Conflict, NotFound, TooManyJobs, TransitionRefused
from bento_service.jobs.job import TRANSITIONS, JobError, JobStatus, Lease, OpenJobLimits
from bento_service.jobs.store import LeaseLost, Store
from bento_service.training.events import TrainerEvent
from tests.job_factory import make_file, make_job, submit


def claim(store, free_devices=1, owner="a"):
    return store.claim(owner, host="host", free_devices=free_devices, lease_seconds=30)


def lease_of(job):
    return Lease(job_id=job.id, token=job.lease_token)


def event(seq, type="metrics", **data):
    return TrainerEvent(seq=seq, time=1000.0 + seq, type=type, message=f"event {seq}", data=data)


def messages(store, job_id):
    return [e.message for e in store.list_events(job_id, order="asc", limit=100).data]


def test_a_job_comes_back_as_it_was_stored(store):
    file = store.add_file(make_file())
    job = make_job(file.id, options={"client_id": "me", "priority": 3}, metadata={"team": "a"}, beta=0.3)
    stored, created = store.create_job(job)
    assert created
    again = store.get_job(job.id)
    assert again == stored
    assert (again.request, again.spec, again.priority) == (job.request, job.spec, 3)
    assert again.status is JobStatus.QUEUED
    assert again.queue_position == 1
    states = [e.data.get("to") for e in store.list_events(job.id, order="asc").data]
    assert states == ["validating_files", "queued"]


def test_reopening_finds_everything(database_url):
    first = Store.open(database_url)
    job = submit(first)
    first.close()
    second = Store.open(database_url)
    assert second.get_job(job.id) == job
    second.close()


def test_a_job_whose_file_is_gone_is_not_stored(store):
    with pytest.raises(NotFound, match="file-missing"):
        store.create_job(make_job("file-missing"))
    assert store.list_jobs().data == []


def test_same_client_id_and_body_is_the_same_job(store):
    file = store.add_file(make_file())
    first, created = store.create_job(make_job(file.id, options={"client_id": "me"}))
    second, again = store.create_job(make_job(file.id, options={"client_id": "me"}))
    assert created and not again
    assert second.id == first.id
    with pytest.raises(ClientIdConflict, match=first.id):
        store.create_job(make_job(file.id, options={"client_id": "me"}, beta=0.5))
    assert len(store.list_jobs().data) == 1


def test_fifty_identical_submits_at_once_make_one_job(store):
    file = store.add_file(make_file())
    barrier = threading.Barrier(50)
    ids, errors = [], []

    def submit_one():
        job = make_job(file.id, options={"client_id": "me"})
        barrier.wait()
        try:
            ids.append(store.create_job(job)[0].id)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=submit_one) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(ids) == 50 and len(set(ids)) == 1
    assert len(store.list_jobs().data) == 1


def test_the_queue_is_by_priority_then_age(store):
    old, urgent, young = submit(store), submit(store, options={"priority": 5}), submit(store)
    assert [store.get_job(j.id).queue_position for j in (urgent, old, young)] == [1, 2, 3]
    assert [claim(store).id for _ in range(3)] == [urgent.id, old.id, young.id]
    assert claim(store) is None


def test_a_large_head_is_waited_for(store):
    large = submit(store, options={"devices": 2})
    submit(store)
    assert claim(store, free_devices=1) is None
    assert claim(store, free_devices=2).id == large.id


@pytest.mark.parametrize("status", [s for s in JobStatus if not TRANSITIONS[s]])
def test_terminal_states_never_change(store, status):
    job = submit(store)
    if status is JobStatus.CANCELLED:
        store.request_stop(job.id, "cancel")
    else:
        store.finish(lease_of(claim(store)), status, "over", error=JobError(code="x", message="y"))
    before = store.get_job(job.id), messages(store, job.id)
    with pytest.raises(TransitionRefused, match=str(status)):
        store.request_stop(job.id, "pause")
    with pytest.raises(TransitionRefused):
        store.resume(job.id)
    assert claim(store) is None
    assert (store.get_job(job.id), messages(store, job.id)) == before
    assert before[0].finished_at is not None


def test_cancel_of_a_queued_job_is_at_once_and_twice_is_once(store):
    job = submit(store)
    assert store.request_stop(job.id, "cancel").status is JobStatus.CANCELLED
    history = messages(store, job.id)
    assert store.request_stop(job.id, "cancel").status is JobStatus.CANCELLED
    assert messages(store, job.id) == history


def test_cancel_of_a_running_job_is_told_to_its_supervisor(store):
    submit(store)
    job = claim(store)
    assert store.request_stop(job.id, "pause").wanted == "pause"
    assert store.request_stop(job.id, "cancel").wanted == "cancel"
    assert store.request_stop(job.id, "pause").wanted == "cancel"
    assert store.heartbeat(lease_of(job), lease_seconds=30) == "cancel"
    done = store.finish(lease_of(job), JobStatus.CANCELLED, "gone")
    assert (done.status, done.wanted) == (JobStatus.CANCELLED, None)


def test_pause_and_resume(store):
    job = submit(store)
    store.request_stop(job.id, "pause")
    assert claim(store) is None
    assert store.resume(job.id).status is JobStatus.QUEUED
    assert claim(store).id == job.id


def test_a_stale_token_writes_nothing(store):
    submit(store)
    old = claim(store)
    new = store.adopt(old.id, "b", lease_seconds=30, from_token=old.lease_token)
    assert store.adopt(old.id, "c", lease_seconds=30, from_token=old.lease_token) is None
    before = store.get_job(old.id), messages(store, old.id)
    stale = lease_of(old)
    for write in (
        lambda: store.heartbeat(stale, lease_seconds=99),
        lambda: store.record(stale, [event(1, step=1)], offset=10),
        lambda: store.note(stale, "hello"),
        lambda: store.launched(stale, pid=1, pid_created_at=1.0, devices=["0"]),
        lambda: store.finish(stale, JobStatus.FAILED, "no"),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert (store.get_job(old.id), messages(store, old.id)) == before
    assert store.wanted([stale]) == {}
    assert store.heartbeat(new, lease_seconds=30) is None


def test_a_finished_lease_is_over(store):
    submit(store)
    job = claim(store)
    store.finish(lease_of(job), JobStatus.QUEUED, "again", retry_after=0)
    with pytest.raises(LeaseLost):
        store.heartbeat(lease_of(job), lease_seconds=30)


def test_back_off_is_waited_out(store):
    submit(store)
    job = claim(store)
    store.finish(lease_of(job), JobStatus.QUEUED, "later", retry_after=3600, infrastructure=True)
    assert claim(store) is None
    assert store.failures(job.id) == 1
    assert [(a.number, a.reason) for a in store.list_attempts(job.id)] == [(1, "later")]


def test_events_are_carried_once_with_progress_and_checkpoints(store):
    submit(store)
    job = claim(store)
    lease = lease_of(job)
    store.record(lease, [event(1, "progress", step=0, total_steps=4, epoch=0.0, tokens=0)], offset=100)
    metrics = {"step": 2, "total_steps": 4, "epoch": 0.5, "tokens": 64, "loss": 0.6, "grad_norm": None}
    store.record(lease, [event(2, **metrics)], offset=200)
    saved = {"step": 2, "epoch": 0.5, "path": "/c/2", "bytes": 7, "final": False}
    store.record(lease, [event(3, "checkpoint", **saved)], offset=300)
    assert store.event_offset(lease) == 300
    progress = store.get_job(job.id).progress
    assert (progress.step, progress.total_steps, progress.tokens) == (2, 4, 64)
    assert progress.metrics == {"loss": 0.6, "grad_norm": None}
    assert progress.estimated_finish == 1003  # a step took half a second: two more end a second after event 2
    (checkpoint,) = store.list_checkpoints(job.id).data
    assert (checkpoint.step, checkpoint.path, checkpoint.metrics) == (2, "/c/2", progress.metrics)
    assert messages(store, job.id)[-3:] == ["event 1", "event 2", "event 3"]
    store.record(lease, [event(4, "message", removed="/c/2")], offset=400)
    assert store.list_checkpoints(job.id).data == []


def test_events_page_both_ways_without_gaps(store):
    job = submit(store)
    claim(store)
    lease = lease_of(store.get_job(job.id))
    store.record(lease, [event(n, step=n, epoch=0.0) for n in range(1, 11)], offset=1)
    for order in ("asc", "desc"):
        seen, after = [], None
        while True:
            page = store.list_events(job.id, after=after, limit=4, order=order)
            seen += [e.seq for e in page.data]
            if not page.has_more:
                break
            after = page.data[-1].id
        assert seen == sorted(range(1, 14), reverse=order == "desc")


def test_jobs_page_and_filter(store):
    made = [submit(store, metadata={"team": "ab"[n % 2]}, options={"client_id": f"c{n}"}) for n in range(5)]
    first = store.list_jobs(limit=2)
    assert [j.id for j in first.data] == [made[4].id, made[3].id] and first.has_more
    rest = store.list_jobs(after=first.data[-1].id, limit=3)
    assert [j.id for j in rest.data] == [j.id for j in made[2::-1]] and not rest.has_more
    assert [j.id for j in store.list_jobs(metadata={"team": "b"}).data] == [made[3].id, made[1].id]
    assert [j.id for j in store.list_jobs(client_id="c2").data] == [made[2].id]
    odd = 'a "quoted" $.key\\'
    strange = submit(store, metadata={odd: "'x'", "team": "c"})
    assert [j.id for j in store.list_jobs(metadata={odd: "'x'", "team": "c"}).data] == [strange.id]
    assert store.list_jobs(metadata={odd: "x"}).data == []
    plain = submit(store, metadata={})
    assert [j.id for j in store.list_jobs(without_metadata=True).data] == [plain.id]


def test_a_file_in_use_is_kept_and_bytes_go_with_their_last_name(store):
    one, two = store.add_file(make_file(sha256="a" * 64)), store.add_file(make_file(sha256="a" * 64))
    job, _ = store.create_job(make_job(one.id))
    with pytest.raises(Conflict, match=job.id):
        store.delete_file(one.id)
    store.request_stop(job.id, "cancel")
    assert store.delete_file(one.id) is False
    assert store.delete_file(two.id) is True
    with pytest.raises(NotFound):
        store.get_file(two.id)


def test_open_jobs_are_counted_per_caller_and_in_all(store):
    limits = OpenJobLimits(total=3, per_caller=2)
    file = store.add_file(make_file())

    def create(caller):
        return store.create_job(make_job(file.id, submitted_by=caller), limits)[0]

    first = create("ci")
    assert store.get_job(first.id).submitted_by == "ci"
    create(None)
    create(None)
    for caller, setting in ((None, "TRL_MAX_OPEN_JOBS_PER_KEY"), ("ci", "TRL_MAX_OPEN_JOBS on")):
        with pytest.raises(TooManyJobs, match=setting):
            create(caller)
        with pytest.raises(TooManyJobs, match=setting):
            store.require_room(caller, limits)
    store.request_stop(first.id, "cancel")
    assert create("ci").submitted_by == "ci"
