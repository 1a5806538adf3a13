"""The Bento: built offline, it holds the service and nothing else, is served as the checkout is, and trains."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.bento_server import REPOSITORY, bento_server
from tests.core_factory import PAIRS, json_lines
from tests.tiny_model import make_tiny_model

MODEL = "org/tiny"
TAG = "trl_training_service:latest"
TRAINING_SECONDS = 180


@pytest.fixture(scope="module")
def bentos(tmp_path_factory):
    """A BENTOML_HOME with the Bento in it, made without a network: every proxy is one that nobody listens on."""
    home = tmp_path_factory.mktemp("bentos")
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRL_", "BENTOML_", "PYTHONPATH"))}
    environment = {**inherited, **nowhere, "UV_OFFLINE": "1", "PIP_NO_INDEX": "1", "BENTOML_HOME": str(home)}
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag"],
        cwd=REPOSITORY,
        env={**environment, "BENTOML_DO_NOT_TRACK": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "__tag__:trl_training_service:" in built.stdout
    return home


@pytest.fixture(scope="module")
def bento(bentos):
    """The folder of the one Bento."""
    (folder,) = [path for path in (bentos / "bentos" / "trl_training_service").iterdir() if path.is_dir()]
    return folder


def files_under(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def requirements(text):
    """Each pinned requirement: ``name==version``, its marker, its hashes."""
    found = re.findall(r"^([\w.-]+==[^\s;]+)([^\\\n]*)((?:\\\n.*)*)", text, re.MULTILINE)
    return {
        (name, marker.strip(" ;").replace('"', "'"), frozenset(re.findall(r"--hash=(\S+)", rest)))
        for name, marker, rest in found
    }


def test_it_holds_the_service_and_nothing_else(bento):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "bento_service/*.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(listed.stdout.split())
    assert "bento_service/jobs/migrations/env.py" in modules
    assert files_under(bento / "src") == modules | {"LICENSE", "bentofile.yaml"}
    (setup,) = (bento / "env" / "docker").glob("script__*")
    assert files_under(bento) - {f"src/{name}" for name in files_under(bento / "src")} == {
        "README.md",
        "bento.yaml",
        "apis/openapi.yaml",
        "apis/schema.json",
        "env/docker/Dockerfile",
        "env/docker/entrypoint.sh",
        f"env/docker/{setup.name}",
        "env/python/requirements.in",
        "env/python/requirements.txt",
    }
    assert (bento / "README.md").read_text() == (REPOSITORY / "deploy" / "bento.md").read_text()
    assert sum(path.stat().st_size for path in (bento / "src").rglob("*") if path.is_file()) < 2 * 10**6


def test_its_requirements_are_the_projects_lock(bento):
    lock = (REPOSITORY / "requirements" / "service.txt").read_text()
    ours, everything = requirements(lock), requirements((REPOSITORY / "requirements" / "dev.txt").read_text())
    # Markers may differ: what needs a requirement decides them.
    known = {(name, hashes) for name, _, hashes in everything}
    assert {(name, hashes) for name, _, hashes in ours} <= known, "service.txt is of another resolution: make lock"
    assert all(hashes for _, _, hashes in ours)
    names = {name.partition("==")[0] for name, _, _ in ours}
    # CUDA comes with torch's wheel for Linux; PostgreSQL's driver is in every image.
    assert {"torch", "nvidia-cublas", "triton", "psycopg", "psycopg-binary", "trl", "bentoml"} <= names
    assert not names & {"pytest", "llama-stack", "mypy", "ruff"}
    # BentoML adds a line with its own version, which must be the one that is locked.
    (bentoml,) = [name for name, _, _ in ours if name.startswith("bentoml==")]
    theirs = requirements((bento / "env" / "python" / "requirements.txt").read_text())
    assert theirs == ours | {(bentoml, "", frozenset())}


def test_what_it_tells_a_platform(bento):
    told = yaml.safe_load((bento / "bento.yaml").read_text())
    (service,) = told["services"]
    assert service["config"]["http"]["port"] == 8080
    assert service["config"]["resources"] == {"gpu": 1, "gpu_type": "nvidia-l4"}
    assert told["labels"] == {"task": "preference-training", "framework": "trl", "api": "openai-fine-tuning"}
    assert told["envs"] and all(variable["value"] for variable in told["envs"])
    assert told["image"]["base_image"] == "python:3.12-slim"
    containerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "\nUSER bentoml\n" in containerfile
    assert "ENV TRL_HOME=$TRL_HOME" in containerfile


@pytest.fixture(scope="module")
def server(bentos, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    make_tiny_model(directory / "models" / MODEL)
    environment = {"BENTOML_HOME": str(bentos)}
    with bento_server(directory, models=directory / "models", environment=environment, served=TAG) as server:
        yield server


def test_it_is_served_as_the_checkout_is(server, bento, tmp_path):
    home = {"BENTOML_HOME": str(tmp_path / "bentoml")}
    with bento_server(tmp_path, environment=home, served=".", where=REPOSITORY) as checkout:
        for path in ("/readyz", "/openapi.json", "/schema.json", "/v1/files", "/v1/models", "/v1/fine_tuning/jobs"):
            ours, theirs = (httpx.get(f"{one.url}{path}", trust_env=False, timeout=30) for one in (server, checkout))
            assert ours.status_code == theirs.status_code == 200, path
            if path != "/v1/models":  # of which only one has some
                assert without_times(ours) == without_times(theirs), path
        assert runs_from(checkout) == REPOSITORY
    assert runs_from(server) == bento / "src"


def without_times(answer):
    return re.sub(rb'"created_?a?t?":\d+', b"", answer.content)


def runs_from(server):
    """The folder from which the service gives its supervisor, and so the trainers, their code."""
    (supervisor,) = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if process.cmdline()[-2:] == ["-m", "bento_service.jobs"]
    ]
    return Path(supervisor.environ()["PYTHONPATH"].split(os.pathsep)[0]).resolve()


def test_it_trains_and_keeps_its_state_under_its_home(server, bento):
    before = files_under(bento)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        file = client.post("/v1/files", files={"file": ("pairs.jsonl", json_lines(PAIRS))}).json()
        body = {"model": MODEL, "training_file": file["id"], "trl": {"max_length": 64}}
        job = client.post("/v1/fine_tuning/jobs", json=body).json()
        deadline = time.monotonic() + TRAINING_SECONDS
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            assert time.monotonic() < deadline, (json.dumps(job), server.log())
            time.sleep(0.2)
            job = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert job["status"] == "succeeded", (job["error"], server.log())
    assert (server.home / "trl-remote.db").is_file()
    # Bytecode is Python's own affair.
    assert {name for name in files_under(bento) if not name.endswith(".pyc")} == before
    assert {path.name for path in server.log_file.parent.iterdir()} == {"models", "trl", "service.log"}
