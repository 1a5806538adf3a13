"""Watching a running job of a real service: nothing is missed, whoever is cut off, and nothing hangs on a watcher."""

import json
import os
import signal
import sys
import threading
import time

import httpx
import pytest

from tests.bento_server import REPOSITORY, bento_server
from tests.core_factory import MODEL, PAIRS, json_lines

JOBS = "/v1/fine_tuning/jobs"
STEPS = 12

# The scripted trainer, which takes its time and notes in each event when it was written.
TRAINER = f"""
import json, pathlib, runpy, sys, time
from bento_service.training import events
write = events.EventWriter.write
events.EventWriter.write = lambda self, *given, **data: write(self, *given, **data, written=time.time())
script = {{"steps": {STEPS}, "step_seconds": 0.3}}
(pathlib.Path(sys.argv[1]) / "script.json").write_text(json.dumps(script))
runpy.run_path({str(REPOSITORY / "tests" / "scripted_trainer.py")!r}, run_name="__main__")
"""


@pytest.fixture
def server(tmp_path):
    models = tmp_path / "models" / MODEL
    models.mkdir(parents=True)
    (models / "config.json").write_text('{"model_type": "llama"}')
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)
    environment = {"TRL_TRAINER_COMMAND": f"{sys.executable} {trainer}"}
    with bento_server(tmp_path / "service", models=tmp_path / "models", environment=environment) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        yield client


def submit(client):
    file = client.post("/v1/files", files={"file": ("pairs.jsonl", json_lines(PAIRS))}).json()["id"]
    answer = client.post(JOBS, json={"model": MODEL, "training_file": file})
    answer.raise_for_status()
    return answer.json()["id"]


class Watcher:
    """One client of a stream: ids and objects of what it received, and the seconds each took to arrive."""

    def __init__(self, url, job_id):
        self.path, self.url = f"{JOBS}/{job_id}/events?stream=true", url
        self.ids, self.events, self.delays, self.done = [], [], [], False

    def watch(self, *, count=None):
        """Until the stream ends, or for so many events and then cut off."""
        headers = {"last-event-id": self.ids[-1]} if self.ids else {}
        with (
            httpx.Client(base_url=self.url, trust_env=False, timeout=60) as client,
            client.stream("GET", self.path, headers=headers) as stream,
        ):
            assert stream.status_code == 200
            received = 0
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(line.removeprefix("id: "))
                elif line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    self.events.append(event)
                    if "written" in event["data"]:
                        self.delays.append(time.time() - event["data"]["written"])
                    received += 1
                    if received == count:
                        return
        return


def test_two_watchers_and_one_that_is_cut_off_each_see_everything(server, client):
    job_id = submit(client)
    steady = [Watcher(server.url, job_id) for _ in range(2)]
    threads = [threading.Thread(target=watcher.watch) for watcher in steady]
    for thread in threads:
        thread.start()
    cut_off = Watcher(server.url, job_id)
    while not cut_off.done:
        cut_off.watch(count=3)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    page = client.get(f"{JOBS}/{job_id}/events", params={"order": "asc", "limit": 100}).json()
    assert page["has_more"] is False
    states = [event["data"]["to"] for event in page["data"] if event["data"]["type"] == "state"]
    assert states == ["validating_files", "queued", "running", "succeeded"]
    for watcher in (*steady, cut_off):
        assert watcher.events == page["data"], server.log()
        assert watcher.ids == [event["id"] for event in page["data"]]
        assert watcher.done
    for watcher in steady:
        assert len(watcher.delays) == STEPS + 1
        assert sorted(watcher.delays)[len(watcher.delays) // 2] < 1.0
    # The attempts and the log of the same run.
    (attempt,) = client.get(f"{JOBS}/{job_id}/attempts").json()["data"]
    assert (attempt["number"], attempt["exit_code"], attempt["signal"]) == (1, 0, None)
    whole = client.get(f"{JOBS}/{job_id}/logs").json()["content"]
    assert whole.startswith("attempt 1 from step 0\n")
    last = client.get(f"{JOBS}/{job_id}/logs", params={"tail": 1}).json()["content"]
    assert last == whole.splitlines(keepends=True)[-1]


def test_a_watcher_does_not_keep_the_service_from_stopping(server, client):
    job_id = submit(client)
    watcher = Watcher(server.url, job_id)
    watcher.watch(count=4)  # it runs
    with client.stream("GET", f"{JOBS}/{job_id}/events?stream=true") as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(server.process.pid, signal.SIGTERM)
        with pytest.raises((StopIteration, httpx.RemoteProtocolError)):
            while True:
                next(lines)
        server.process.wait(30)
    assert "request.crashed" not in server.log()
