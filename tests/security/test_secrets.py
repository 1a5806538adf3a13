"""A service with secrets trains a job: nothing that it writes, answers or hands to a trainer holds one of them."""

import json
import time

import httpx
import psutil
import pytest

from tests.bento_server import bento_server
from tests.core_factory import PAIRS, json_lines
from tests.tiny_model import make_tiny_model

MODEL = "org/tiny-trained"
KEY, OTHER_KEY, WRONG_KEY = "Zx8-key-of-ci-41", "Zx8-key-of-anna-42", "Zx8-key-of-nobody-43"
CLOUD_SECRET = "Zx8-of-the-cloud-44"
SECONDS = 240


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server after it has refused a few callers and trained a job; what was answered; trainers' environments."""
    folder = tmp_path_factory.mktemp("service")
    make_tiny_model(folder / "models" / MODEL)
    secrets = {
        "TRL_API_KEYS": f"ci:{KEY},anna:{OTHER_KEY}",
        "TRL_DATABASE_URL": f"sqlite:///{folder}/private-database.db",
        "AWS_SECRET_ACCESS_KEY": CLOUD_SECRET,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    answers, environments = [], {}
    with bento_server(folder, models=folder / "models", environment=secrets) as server:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:

            def send(method, path, key=KEY, **request):
                answer = client.request(method, path, headers={"authorization": f"Bearer {key}"}, **request)
                answers.append(answer)
                return answer

            assert send("GET", "/v1/files", key=WRONG_KEY).status_code == 401
            for path in ("/docs", "/openapi.json", "/health", "/readyz"):
                assert client.get(path).status_code == 200, path
            for path in ("/", "/schema.json", "/metrics", "/v1/models"):
                assert client.get(path).status_code == 401, path

            file = send("POST", "/v1/files", files={"file": ("pairs.jsonl", json_lines(PAIRS * 2))}).json()
            body = {"model": MODEL, "training_file": file["id"], "trl": {"max_length": 64, "max_steps": 2}}
            job = send("POST", "/v1/fine_tuning/jobs", json=body).json()
            bento = {"model": "org/absent", "training_file": file["id"]}
            assert send("POST", "/train_dpo", json=bento).status_code == 400
            deadline = time.monotonic() + SECONDS
            while job["status"] not in ("succeeded", "failed"):
                assert time.monotonic() < deadline, server.log()
                environments |= trainer_environments(server)
                job = send("GET", f"/v1/fine_tuning/jobs/{job['id']}").json()
                time.sleep(0.1)
            assert job["status"] == "succeeded", server.log()
            for part in ("events?limit=100", "checkpoints", "attempts", "logs", "manifest"):
                assert send("GET", f"/v1/fine_tuning/jobs/{job['id']}/{part}").status_code == 200
            found = {"job": job, "answers": answers, "environments": environments, "server": server}
        yield found


def trainer_environments(server):
    """Of the trainers that run now, those that wait for a job included: their environments by pid."""
    found = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if any("bento_service.training" in part for part in process.cmdline()):
                found[process.pid] = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def written(server):
    """Everything under the service's home and its log, by name."""
    files = [path for path in server.log_file.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): path.read_bytes() for path in files if "models" not in path.parts}


def test_no_key_is_written_anywhere(served):
    """Not in logs, events, manifests, the database or run directories; neither are the wrong ones that were tried."""
    texts = written(served["server"])
    assert any(name.endswith("spec.json") for name in texts) and any(
        name.endswith("private-database.db") for name in texts
    )
    for secret in (KEY, OTHER_KEY, WRONG_KEY, CLOUD_SECRET):
        assert [name for name, content in texts.items() if secret.encode() in content] == []
    log = served["server"].log()
    assert "access.refused" in log


def test_no_answer_holds_a_key(served):
    for answer in served["answers"]:
        for secret in (KEY, OTHER_KEY, WRONG_KEY, CLOUD_SECRET, "private-database"):
            assert secret not in answer.text + str(answer.headers), answer.url


def test_the_name_of_a_key_says_who_submitted_a_job(served):
    assert served["job"]["trl"]["submitted_by"] == "ci"
    (line,) = [line for line in served["server"].log().splitlines() if '"job.submitted"' in line]
    logged = json.loads(line[line.index("{") :])
    assert (logged["caller"], logged["job"]) == ("ci", served["job"]["id"])
    assert logged["request_id"]


def test_a_trainer_has_no_secrets_in_its_environment(served):
    """It gets what is on a list, and no more: no API keys, no database, none of what else the service was given."""
    environments = served["environments"]
    assert environments, "no trainer was seen"
    for environment in environments.values():
        assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"  # what is on the list does arrive
        assert not [name for name in environment if name.startswith(("TRL_", "AWS_", "BENTOML_"))]
        for secret in (KEY, OTHER_KEY, CLOUD_SECRET, "private-database"):
            assert not [name for name, value in environment.items() if secret in value]
