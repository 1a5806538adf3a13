"""The image that ``bentoml containerize`` makes: it serves as an unprivileged user, and its jobs outlive its end.

Only by ``make test-container``: buildah builds the image (about 7 GB, from requirements/service.txt with CUDA) on a
base that stands in for python:3.12-slim (base_image.py), and it runs in namespaces that stand in for a container
engine (container.py). There is no GPU in it, and its network is the host's.
"""

import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from bento_service.jobs.job import JobStatus
from bento_service.jobs.store import Store
from tests.bento_server import REPOSITORY, free_port
from tests.container import base_image
from tests.container.container import Container, Image
from tests.container.tools import missing, run
from tests.core_factory import PAIRS, json_lines
from tests.tiny_model import make_tiny_model
from tests.trainer_run import preference_rows, write_rows

MODEL = "org/tiny"
KEY = "kept-secret"
HOME = "/home/bentoml/.trl-remote"
STEPS, STEPS_BETWEEN_CHECKPOINTS = 240, 20
DEADLINE = 180

SERVICE = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())["services"]["trl"]
STOP_SECONDS = int(SERVICE["stop_grace_period"].removesuffix("s"))


@pytest.fixture(scope="module")
def folder():
    """For what is too large to be kept, as pytest's own folders are."""
    where = Path(tempfile.gettempdir())
    problem = missing(where)
    assert problem is None, problem
    folder = Path(tempfile.mkdtemp(prefix="trl-remote-image-", dir=where))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(folder):
    """The built image, in a store of its own."""
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        patch.setenv("BUILDAH_ISOLATION", "chroot")
        patch.setenv("BENTOML_HOME", str(folder / "bentoml"))
        patch.setenv("BENTOML_DO_NOT_TRACK", "true")
        patch.setenv("TMPDIR", str(folder))  # where buildah keeps what it copies
        patch.chdir(REPOSITORY)
        try:
            base_image.make_base_image(folder)
            bentoml = (sys.executable, "-m", "bentoml")
            run(*bentoml, "build", "--output", "tag")
            # The wheels that this machine has are not fetched again.
            cache = run(Path(sys.executable).with_name("uv"), "cache", "dir").strip()
            Path(cache).mkdir(parents=True, exist_ok=True)
            options = ("network=host", "pull-never", f"volume={cache}:{base_image.UV_CACHE}")
            run(
                *(*bentoml, "containerize", "trl_training_service:latest", "--backend", "buildah", "-t", "trl:test"),
                *(part for option in options for part in ("--opt", option)),
            )
            yield Image.mount("localhost/trl:test")
        finally:
            run("buildah", "umount", "--all")
            run("buildah", "rm", "--all")
            run("buildah", "rmi", "--all", "--force")


@pytest.fixture(scope="module")
def home(folder, image):
    """What a new volume of Docker's is at first: empty, with the owner of the folder that it is mounted on."""
    volume = folder / "volume"
    volume.mkdir(mode=0o750)
    os.chown(volume, *image.owner(HOME))
    return volume


@pytest.fixture(scope="module")
def container(folder, image, home):
    models = folder / "models"
    make_tiny_model(models / MODEL)
    run("chmod", "-R", "a+rX", models)
    port = free_port()
    container = Container(
        image,
        folder / "container.log",
        environment={
            "TRL_API_KEYS": f"tests:{KEY}",
            "TRL_MODELS_DIR": "/models",
            "TRL_HUB_MODELS": "false",
            "TRL_GRACE_SECONDS": SERVICE["environment"]["TRL_GRACE_SECONDS"],
            "TRL_RETRY_BACKOFF_SECONDS": "0.5",
            "TRL_WARM_TRAINERS": "0",
            "OMP_NUM_THREADS": "1",
            "BENTOML_PORT": str(port),
        },
        volumes={HOME: home, "/models": models},
        hostname=SERVICE["hostname"],
    )
    container.start()
    try:
        yield container
    finally:
        container.kill()


@pytest.fixture(scope="module")
def client(container):
    url = f"http://127.0.0.1:{container.environment['BENTOML_PORT']}"
    with httpx.Client(base_url=url, trust_env=False, timeout=30, headers={"x-api-key": KEY}) as client:
        wait(lambda: is_ready(client), container)
        yield client


def is_ready(client):
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def wait(condition, container):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert container.processes(), container.log()
        assert time.monotonic() < deadline, container.log()
        time.sleep(0.1)


@contextmanager
def stored(home):
    store = Store.open(f"sqlite:///{home / 'trl-remote.db'}")
    try:
        yield store
    finally:
        store.close()


def health_command(port):
    """What deploy/compose.yaml asks, on the test's port."""
    kind, *command = SERVICE["healthcheck"]["test"]
    assert kind == "CMD" and ":8080/readyz" in command[-1]
    return [part.replace(":8080/", f":{port}/") for part in command]


def test_it_serves_as_an_unprivileged_user(container, client, image):
    uid, gid, _ = image.user()
    assert (uid, gid) == (1034, 1034)
    assert {process.uids().effective for process in container.processes()} == {uid}
    assert client.get("/health").json()["status"] == "healthy"
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert httpx.get(client.base_url.join("/v1/models"), trust_env=False).status_code == 401


def test_it_reads_what_it_should_and_holds_no_more(container, client):
    inside = container.run("python", "-c", "import torch, psycopg, trl; print(torch.version.cuda is not None)")
    assert inside.stdout == "True\n", inside.stderr
    # Triton compiles with it at run time.
    assert container.run("gcc", "--version").returncode == 0
    assert container.run("sh", "-c", "ls bento_service src/bento_service/tests").returncode != 0
    assert container.run("touch", "/etc/passwd").returncode != 0


def test_its_health_check(container, client):
    port = container.environment["BENTOML_PORT"]
    checked = container.run(*health_command(port))
    assert checked.returncode == 0, checked.stderr
    assert container.run(*health_command(free_port())).returncode != 0


def test_a_model_that_its_user_may_not_read_is_refused(container, client):
    weights = container.volumes["/models"] / MODEL / "model.safetensors"
    weights.chmod(0o600)
    try:
        file = client.post("/v1/files", files={"file": ("pairs.jsonl", json_lines(PAIRS))}).json()
        answer = client.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file["id"]})
    finally:
        weights.chmod(0o644)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model"), container.log()
    assert "uid 1034) may not read model.safetensors: chmod" in answer.json()["error"]["message"]


def test_a_job_outlives_a_stop_and_a_kill_of_the_container(container, client, home, tmp_path):
    rows = write_rows(tmp_path / "pairs.jsonl", preference_rows(16))
    file = client.post("/v1/files", files={"file": ("pairs.jsonl", rows.read_bytes())}).json()
    body = {
        "model": MODEL,
        "training_file": file["id"],
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": STEPS, "batch_size": 4}}},
        "trl": {
            "max_length": 64,
            "max_steps": STEPS,
            "saving": {"strategy": "steps", "steps": STEPS_BETWEEN_CHECKPOINTS},
        },
    }
    submitted = client.post("/v1/fine_tuning/jobs", json=body)
    assert submitted.status_code == 200, (submitted.text, container.log())
    job_id = submitted.json()["id"]

    def job():
        return client.get(f"/v1/fine_tuning/jobs/{job_id}").json()

    def steps_done(count):
        wait(lambda: (job()["trl"]["progress"]["step"] or 0) >= count, container)

    # Stopped in order: in time, with exit status 0, and the job is queued again with a checkpoint.
    steps_done(STEPS_BETWEEN_CHECKPOINTS + 5)
    assert container.stop(STOP_SECONDS) == 0, container.log()
    with stored(home) as store:
        assert store.get_job(job_id).status is JobStatus.QUEUED
        assert store.failures(job_id) == 0
    checkpoints = home / "runs" / job_id / "checkpoints"
    saved = max(int(path.name.partition("-")[2]) for path in checkpoints.glob("checkpoint-*"))
    assert saved >= STEPS_BETWEEN_CHECKPOINTS + 5
    assert {path.stat().st_uid for path in home.rglob("*")} == {1034}

    # Killed with everything in it.
    container.start()
    wait(lambda: is_ready(client), container)
    steps_done(saved + STEPS_BETWEEN_CHECKPOINTS + 5)
    container.kill()
    assert container.processes() == []

    container.start()
    wait(lambda: is_ready(client), container)
    wait(lambda: job()["status"] in ("succeeded", "failed", "cancelled"), container)
    assert job()["status"] == "succeeded", (job()["error"], container.log())
    assert job()["trl"]["attempt"] == 3
    with stored(home) as store:
        events = store.list_events(job_id, order="asc", limit=10_000).data
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert set(steps) == set(range(1, STEPS + 1))
    # After the stop it went on where it was; after the kill, from the last checkpoint, and never from the start.
    assert steps.count(1) == 1
    assert len(steps) - STEPS <= STEPS_BETWEEN_CHECKPOINTS


def test_it_ends_when_its_worker_dies(container, client):
    """BentoML starts no other one in a container; a restart policy does."""
    (worker,) = [process for process in container.processes() if "_bentoml_impl.worker.service" in process.cmdline()]
    worker.kill()
    deadline = time.monotonic() + DEADLINE
    while container.processes():
        assert time.monotonic() < deadline, container.log()
        time.sleep(0.1)
