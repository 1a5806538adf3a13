"""What follows a job over HTTP: the event stream, the log, the attempts, the estimated start."""

import json
import time

import pytest
from openai._streaming import SSEDecoder
from sse_starlette import ServerSentEvent
from starlette.testclient import TestClient

from bento_service.api.app import create_app, in_front_of
from bento_service.api.event_stream import Heartbeat
from bento_service.jobs.job import JobStatus
from bento_service.jobs.store import Store
from bento_service.training.events import TrainerEvent
from bento_service.training.run_directory import RunDirectory
from tests.core_factory import request, upload

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def store(impl):
    store = Store.open(impl.settings.sqlalchemy_url)
    yield store
    store.close()


@pytest.fixture
def ended(impl, store):
    """A job of one attempt, 600 metrics events long: more than a stream reads at once."""
    job = impl.submit(request(upload(impl).id))
    claimed = store.claim("test", host="here", free_devices=1, lease_seconds=60)
    lease = store.adopt(job.id, "test", lease_seconds=60, from_token=claimed.lease_token)
    store.launched(lease, pid=123, pid_created_at=1.0, devices=["0"])
    metrics = [
        TrainerEvent(seq=n, time=1700000000.5, type="metrics", message=f"Step {n}", data={"step": n, "loss": None})
        for n in range(1, 601)
    ]
    store.record(lease, metrics, offset=1)
    store.finish(lease, JobStatus.SUCCEEDED, "Training finished", exit_code=0)
    return job.id


def messages(text):
    """The fields of each message of a stream; comments have none."""
    blocks = text.replace("\r\n", "\n").strip().split("\n\n")
    parsed = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    return [message for message in parsed if "data" in message]


def everything(client, job_id):
    found, after = [], {}
    while True:
        page = client.get(f"{JOBS}/{job_id}/events", params={"order": "asc", "limit": 100} | after).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        after = {"after": page["last_id"]}


def test_a_stream_has_every_event_in_order_and_then_ends(client, ended):
    answer = client.get(f"{JOBS}/{ended}/events", params={"stream": "true"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = messages(answer.text)
    expected = everything(client, ended)
    assert [json.loads(message["data"]) for message in events] == expected
    assert [message["id"] for message in events] == [event["id"] for event in expected]
    assert [message["event"] for message in events] == [event["data"]["type"] for event in expected]
    assert done == {"event": "done", "data": "[DONE]"}


@pytest.mark.parametrize("seen", [1, 300, 603, 604])
def test_a_stream_goes_on_after_the_last_event_that_was_seen(client, ended, seen):
    expected = everything(client, ended)
    assert len(expected) == 604
    last = expected[seen - 1]["id"]
    for more in (
        {"params": {"stream": 1, "after": last}},
        {"params": {"stream": 1}, "headers": {"Last-Event-ID": last}},
    ):
        *events, done = messages(client.get(f"{JOBS}/{ended}/events", **more).text)
        assert [message["id"] for message in events] == [event["id"] for event in expected[seen:]]
        assert done["event"] == "done"


@pytest.mark.parametrize("last", ["ftevent-0-1", "x", "{id}-605", "{id}-0", "{id}-01"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_event_of_another_job_or_none_is_not_found(client, ended, last, stream):
    last = last.replace("{id}", ended.replace("ftjob-", "ftevent-"))
    answer = client.get(f"{JOBS}/{ended}/events", params={"stream": stream, "after": last})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after")


def test_streams_are_bounded_and_their_places_come_back(impl, ended):
    app = create_app(impl)
    with TestClient(in_front_of(app, impl.settings), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        path = f"{JOBS}/{ended}/events?stream=true"
        for _ in range(3):
            assert client.get(path).status_code == 200
        assert app.state.streams.open == 0
        app.state.streams.open = impl.settings.max_streams
        full = client.get(path)
        assert (full.status_code, full.headers["retry-after"]) == (503, "5")
        assert "TRL_MAX_STREAMS" in full.json()["error"]["message"]


def test_the_attempts_of_a_job(client, ended):
    answer = client.get(f"{JOBS}/{ended}/attempts").json()
    (attempt,) = answer["data"]
    times = [attempt.pop("started_at"), attempt.pop("ended_at")]
    assert attempt == {
        "object": "fine_tuning.job.attempt",
        "number": 1,
        "host": "here",
        "devices": ["0"],
        "pid": 123,
        "exit_code": 0,
        "signal": None,
        "reason": "Training finished",
    }
    assert times == sorted(times)
    assert answer["has_more"] is False


def test_the_log_is_paged_and_tailed(client, impl, ended):
    path = f"{JOBS}/{ended}/logs"
    assert client.get(path).json() == {
        "object": "fine_tuning.job.log",
        "offset": 0,
        "next_offset": 0,
        "size": 0,
        "truncated": False,
        "content": "",
    }
    log = RunDirectory(impl.settings.runs_path / ended).log_file
    log.parent.mkdir(parents=True)
    log.write_text("loading\nstep 1\nstep 2\n")
    first = client.get(path, params={"limit": 16}).json()
    rest = client.get(path, params={"offset": first["next_offset"]}).json()
    assert first["content"] + rest["content"] == "loading\nstep 1\nstep 2\n"
    assert client.get(path, params={"tail": 1}).json()["content"] == "step 2\n"
    rotated = client.get(path, params={"offset": 1000}).json()
    assert (rotated["truncated"], rotated["offset"], rotated["content"][:7]) == (True, 0, "loading")


@pytest.mark.parametrize("query", ["offset=-1", "tail=0", "limit=0", "limit=9999999", "offset=1&tail=1"])
def test_a_bad_log_query_is_refused(client, ended, query):
    assert client.get(f"{JOBS}/{ended}/logs?{query}").status_code == 400


@pytest.mark.parametrize("path", ["/attempts", "/logs", "/events?stream=true"])
def test_an_unknown_job_is_not_found(client, path):
    assert client.get(f"{JOBS}/ftjob-absent{path}").status_code == 404


def test_the_estimated_start_of_queued_jobs(client, impl, store):
    file_id = upload(impl).id
    jobs = [impl.submit(request(file_id)).id for _ in range(3)]
    starts = [client.get(f"{JOBS}/{job}").json()["trl"]["estimated_start"] for job in jobs]
    assert starts[0] == pytest.approx(time.time(), abs=5)
    assert starts[1:] == [None, None]  # nothing has ended yet by which to tell
    claimed = store.claim("test", host="here", free_devices=1, lease_seconds=60)
    lease = store.adopt(claimed.id, "test", lease_seconds=60, from_token=claimed.lease_token)
    progress = [
        TrainerEvent(seq=n, time=time.time() + n, type=type, message="", data={"step": n - 1, "total_steps": 101})
        for n, type in ((1, "progress"), (2, "metrics"))
    ]
    store.record(lease, progress, offset=1)
    running, waiting = (client.get(f"{JOBS}/{job}").json() for job in jobs[:2])
    assert running["trl"]["estimated_start"] is None
    assert waiting["trl"]["estimated_start"] == running["estimated_finish"]
    listed = {job["id"]: job["trl"]["estimated_start"] for job in client.get(JOBS).json()["data"]}
    assert listed == {jobs[0]: None, jobs[1]: running["estimated_finish"], jobs[2]: None}


def test_a_heartbeat_is_no_message_to_openais_client():
    first, second = (
        ServerSentEvent("{}", id="1", event="state").encode(),
        ServerSentEvent("[DONE]", event="done").encode(),
    )
    sent = [first, Heartbeat().encode(), Heartbeat().encode(), second]
    assert [message.data for message in SSEDecoder().iter_bytes(iter(sent))] == ["{}", "[DONE]"]
