"""docs/api.md describes every operation there is and no other, and its examples run as they are written.

One real service for all of them, with a tiny model under the name that they use.
"""

import os
import re
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bento_service.api.app import create_app
from tests.bento_server import bento_server
from tests.tiny_model import make_tiny_model

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "api.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEY = "choose-a-long-key"
_FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPERATION = re.compile(r"^`([A-Z]+) (/\S+)`$", re.MULTILINE)


def sections():
    """Title and text of each, in order; the first is what stands before all."""
    first, *others = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    return [("", first), *((text.partition("\n")[0], text) for text in others)]


def test_every_operation_has_its_section_with_both_examples_and_its_parameters():
    described = []
    for title, text in sections():
        for method, path in _OPERATION.findall(text):
            described.append((method, path))
            assert {language for language, _ in _FENCE.findall(text)} == {"bash", "python"}, title
            assert f"<!-- table: operation {method} {path} -->" in text, title
    paths = create_app().openapi()["paths"]
    assert sorted(described) == sorted((method.upper(), path) for path, item in paths.items() for method in item)


@pytest.fixture(scope="module")
def elsewhere():
    """A web server with the repository's example data."""
    handler = partial(SimpleHTTPRequestHandler, directory=REPOSITORY / "examples")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(elsewhere, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    make_tiny_model(models / MODEL)
    settings = {
        "TRL_API_KEYS": KEY,
        "TRL_IMPORT_URLS": elsewhere,
        "TRL_IMPORT_PRIVATE_HOSTS": "127.0.0.1",
        "TRL_WARM_TRAINERS": "0",
    }
    with bento_server(tmp_path_factory.mktemp("service"), models=models, environment=settings) as server:
        yield server


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the examples, whose curl fails on errors, without a proxy that the machine has."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / ".curlrc").write_text("fail-with-body\nmax-time = 120\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURL_HOME", str(tmp_path))
    monkeypatch.setenv("TRL_API_KEY", KEY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return tmp_path


def known(names):
    """What the examples for the shell take from answers, of what the examples for Python have been answered."""
    values = {}
    if "file" in names:
        values["FILE"] = names["file"].id
        values["UNUSED_FILE"] = next(iter(names["client"].files.list(order="asc"))).id
    if "job" in names:
        values["JOB"] = names["job"].id
        (first,) = names["http"].get("/v1/fine_tuning/jobs", params={"client_id": "first"}).json()["data"]
        values["OTHER_JOB"] = first["id"]
    if "checkpoint" in names:
        values["STEP"] = str(names["checkpoint"].step_number)
        values["TRAINED_MODEL"] = names["client"].fine_tuning.jobs.retrieve(names["job"].id).fine_tuned_model
    return values


def settle(names):
    """A job that runs is paused once its trainer has ended; a reader of the page waits for that."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = names["client"].fine_tuning.jobs.retrieve(names["job"].id)
        if job.status == "paused":
            return
        time.sleep(0.1)
    raise AssertionError(f"the job is {job.status} and not paused")


def test_the_examples_run_as_they_are_written(server, elsewhere, folder, capsys):
    names = {}
    opening = ""
    for title, text in sections():
        for language, code in _FENCE.findall(text):
            code = code.replace("http://localhost:8080", server.url).replace("https://data.example.org", elsewhere)
            code = code.replace("/pairs.jsonl", "/preferences.jsonl")
            if language == "python":
                exec(compile(code, f"api.md, {title}", "exec"), names)
            elif not title:
                opening = code
            else:
                ran = subprocess.run(
                    ["bash", "-euc", opening + code],
                    env=os.environ | known(names),
                    capture_output=True,
                    text=True,
                    timeout=180,
                )
                assert ran.returncode == 0, (title, ran.stdout, ran.stderr, server.log())
        if title == "Pause a job":
            settle(names)
    assert names["client"].fine_tuning.jobs.retrieve(names["job"].id).status == "succeeded"
    assert not (server.home / "runs" / names["job"].id).exists()  # its model was deleted
    names["http"].close()
    names["client"].close()

    assert (folder / "pairs.jsonl").read_bytes() == (REPOSITORY / "examples" / "preferences.jsonl").read_bytes()
    assert (folder / "checkpoint.tar").stat().st_size > 10_000
    printed = capsys.readouterr().out.splitlines()
    # From the file, the cancelled job, the paused one, its events from the first on, the deleted file, and health.
    for line in ("processed", "cancelled", "paused", "1 Job created", "True", "healthy"):
        assert line in printed
