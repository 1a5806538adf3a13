"""The service as a real process, started each way there is."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import bentoml
import httpx
import psutil
import pytest
from bentoml.exceptions import BentoMLException

from tests.bento_server import REPOSITORY, bento_server
from tests.core_factory import MODEL, PAIRS, json_lines

# Trainers that train nothing and wait to be stopped: these tests are about what is in front of them.
WAITING = {"TRL_TRAINER_COMMAND": f"{sys.executable} -c 'import signal; signal.pause()'"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / MODEL).mkdir(parents=True)
    (folder / MODEL / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, models):
    with bento_server(tmp_path_factory.mktemp("service"), models=models, environment=WAITING) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        yield client


def upload(client, rows=PAIRS):
    answer = client.post("/v1/files", files={"file": ("pairs.jsonl", json_lines(rows))})
    answer.raise_for_status()
    return answer.json()["id"]


def test_health(client):
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "healthy"
    assert answer.json()["service"] == "trl-training-service"


def test_probes_and_pages(client):
    for path in ("/livez", "/readyz", "/docs", "/openapi.json", "/schema.json", "/"):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["x-request-id"], path


def test_metrics_are_ours_and_not_bentos(client):
    client.get("/health")
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert 'trl_jobs{status="queued"}' in answer.text
    assert 'route="/health"' in answer.text
    assert "bentoml" not in answer.text


def test_state_lies_under_its_home_and_nothing_in_the_working_directory(server, client):
    file_id = upload(client)
    assert client.get(f"/v1/files/{file_id}/content").content == json_lines(PAIRS)
    assert (server.home / "trl-remote.db").is_file()
    assert {path.name for path in server.log_file.parent.iterdir()} == {"trl", "bentoml", "service.log"}


@pytest.mark.parametrize(
    ("change", "status", "param", "says"),
    [
        ({"model": "org/absent"}, 400, "model", MODEL),
        ({"training_file": "file-absent"}, 400, "training_file", "POST /v1/files"),
        ({"trl": {"lora": {"rnk": 1}}}, 400, "trl.lora.rnk", "did you mean 'rank'?"),
    ],
)
def test_bad_jobs_are_refused_at_once(client, change, status, param, says):
    before = client.get("/v1/fine_tuning/jobs").json()
    answer = client.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": upload(client)} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert says in error["message"]
    assert client.get("/v1/fine_tuning/jobs").json() == before


def test_rows_without_a_reply_are_refused(client):
    bad = upload(client, [{"prompt": "p", "chosen": "c"}])
    error = client.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": bad}).json()["error"]
    assert (error["code"], error["problems"][0]["row"]) == ("invalid_dataset", 1)


def test_the_three_verbs_as_bento_endpoints(server, client):
    file_id = upload(client)
    with bentoml.SyncHTTPClient(server.url) as bento:
        job = bento.train_dpo(
            model=MODEL, training_file=file_id, hyperparameters={"beta": 0.2}, trl={"client_id": "from-bento"}
        )
        assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
        assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["trl"]["client_id"] == "from-bento"
        assert bento.job_status(job_id=job["id"])["id"] == job["id"]
        assert bento.cancel_job(job_id=job["id"])["id"] == job["id"]
        with pytest.raises(BentoMLException, match="ftjob-absent"):
            bento.job_status(job_id="ftjob-absent")
        with pytest.raises(BentoMLException, match=MODEL):
            bento.train_dpo(model="org/absent", training_file=file_id)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/job_status", {"job_id": "ftjob-absent"}, 404),
        ("/train_dpo", {"model": "org/absent", "training_file": "file-absent"}, 400),
        ("/train_dpo", {"model": MODEL}, 400),
        ("/train_dpo", {"model": MODEL, "training_file": "f", "trl": {"rnk": 1}}, 400),
        ("/train_dpo", {"model": MODEL, "training_file": "f", "metadata": {"k": "x" * 600}}, 400),
    ],
)
def test_bento_endpoints_answer_the_same_status_codes(client, path, body, status):
    assert client.post(path, json=body).status_code == status


def test_bento_endpoints_read_no_pickles_and_no_huge_bodies(client):
    pickled = client.post("/job_status", content=b"", headers={"content-type": "application/vnd.bentoml+pickle"})
    assert pickled.status_code == 415
    assert client.post("/job_status", json={"job_id": "x" * (1 << 20)}).status_code == 413

    def chunks():
        for _ in range(20):
            yield b" " * (1 << 16)

    assert client.post("/job_status", content=chunks()).status_code == 413


def test_the_guard_stands_before_bentos_own_routes_too(client):
    for path in ("/schema.json", "/v1/files", "/", "/docs"):
        assert client.get(path, headers={"host": "rebound.example"}).status_code == 403, path


def in_pieces(*pieces):
    """A body that takes longer to arrive than the timeout of the next test's server."""
    for piece in pieces:
        yield piece
        time.sleep(1.5)


def all_of_the_answer(server, *lines):
    """What is answered to a request that goes no further than these lines, until the service ends the connection."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        first, *rest = lines
        head = [first, f"host: localhost:{url.port}".encode(), b"x-api-key: kept-secret"]
        connection.sendall(b"\r\n".join([*head, *rest]))
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_as_a_script_with_api_keys_and_a_short_timeout(tmp_path, models):
    settings = {
        "TRL_API_KEYS": "kept-secret",
        "TRL_BODY_IDLE_SECONDS": "3",
        "TRL_BODY_BYTES_PER_SECOND": "0",
        "BENTOML_CONFIG_OPTIONS": "services.trl_training_service.traffic.timeout=3",
    }
    with bento_server(tmp_path, models=models, environment=settings, as_script=True) as server:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
            assert client.get("/health").json()["status"] == "healthy"
            for path in ("/v1/files", "/schema.json"):
                assert client.get(path).status_code == 401
                assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
                assert client.get(path, headers={"authorization": "Bearer kept-secret"}).status_code == 200
                assert client.get(path, headers={"x-api-key": "kept-secret"}).status_code == 200
            client.headers = {"x-api-key": "kept-secret"}
            # How long a body takes to arrive is ours to judge, on BentoML's own routes too.
            assert client.post("/job_status", content=in_pieces(b"{", b" ", b" ", b"}")).status_code == 400
            start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            form = {"content-type": "multipart/form-data; boundary=x"}
            slow = client.post("/v1/files", content=in_pieces(start, b"{}\n", b"{}\n", b"\r\n--x--\r\n"), headers=form)
            assert (slow.status_code, slow.json()["bytes"]) == (200, 6)
            length, form_kind = b"content-length: 100", b"content-type: multipart/form-data; boundary=x"
            for path in (b"/v1/files", b"/v1/fine_tuning/jobs", b"/job_status"):
                request = b"POST " + path + b" HTTP/1.1"
                assert all_of_the_answer(server, request, length, form_kind, b"", b"--").startswith(b"HTTP/1.1 408 ")
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        server.process.terminate()
        # uvicorn shuts down in order, and then ends by the signal that it was sent.
        assert server.process.wait(30) == -signal.SIGTERM
        assert not any(child.is_running() for child in children)
    log = server.log()
    assert "service.stopped" in log
    assert "kept-secret" not in log
    lines = (
        r"^Starting TRL Remote Training Service\.\.\.$",
        r"^Service initialized successfully$",
        rf"Uvicorn running on {re.escape(server.url)}",
    )
    found = [re.search(line, log, re.MULTILINE) for line in lines]
    assert all(found), log
    places = [match.start() for match in found if match]
    assert places == sorted(places)


def test_only_trainers_load_training_libraries(server):
    arbiter = psutil.Process(server.process.pid)
    roles = {"_bentoml_impl.worker.service": None, "bento_service.jobs": None}
    for process in arbiter.children(recursive=True):
        roles.update({role: process for role in roles if role in process.cmdline()})
    assert all(roles.values()), "the API worker or the supervisor is missing"
    for process in (arbiter, *roles.values()):
        mapped = {part for file in process.memory_maps() for part in file.path.split("/")}
        assert "pydantic_core" in mapped  # what is loaded shows here
        assert mapped.isdisjoint({"torch", "tokenizers", "pyarrow"}), process.cmdline()


def loaded_by(statement):
    script = f"import sys, json; {statement}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_the_engine_imports_no_training_library():
    loaded = loaded_by("import bento_service.api.app, bento_service.post_training, bento_service.jobs.supervisor")
    assert loaded.isdisjoint({"torch", "transformers", "trl", "peft", "accelerate", "datasets"})


def test_the_arbiter_loads_little_before_it_starts_the_worker():
    """All that it imports, and then the worker imports again, is time until the service is ready."""
    loaded = loaded_by("import bento_service.service; bento_service.service.TrlTrainingService.inner.check_settings()")
    assert "bentoml" in loaded
    assert loaded.isdisjoint({"fastapi", "sqlalchemy", "alembic", "uvicorn", "pynvml"})
