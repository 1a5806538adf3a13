"""A release's server as its user calls it: over REST, and with the client that was released with it."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from tests.compat.releases import Release
from tests.compat.switch import Switch
from tests.stack_server import StackServer

CLIENT_CALLS = Path(__file__).with_name("client_calls.py")
JOB_SECONDS = 240  # trainers share two cores with ten other processes
MODEL = "org/tiny"


class Stack:
    def __init__(self, release: Release, server: StackServer, switch: Switch, python: Path) -> None:
        self.release = release
        self.server = server
        self.switch = switch
        self.python = python
        self.http = httpx.Client(base_url=server.url, timeout=120, trust_env=False)

    # ------------------------------------------------------------------ REST

    def register(self, source: dict[str, Any], dataset_id: str | None = None) -> str:
        assert self.release.datasets is not None
        dataset_id = dataset_id or f"data-{uuid4().hex[:8]}"
        body = {"purpose": "post-training/messages", "source": source, "dataset_id": dataset_id}
        if self.release.name.startswith("0.7"):
            body["purpose"] = "eval/messages-answer"
        self.http.post(self.release.datasets, json=body).raise_for_status()
        return dataset_id

    def upload(self, service_url: str, rows: list[dict[str, Any]]) -> str:
        """A file at the service itself, for releases without datasets."""
        content = "".join(json.dumps(row) + "\n" for row in rows)
        files = {"file": ("rows.jsonl", content)}
        answer = httpx.post(f"{service_url}/v1/files", files=files, timeout=60, trust_env=False)
        return str(answer.raise_for_status().json()["id"])

    def post(self, call: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.http.post(f"{self.release.prefix}/post-training/{call}", json=body, headers=headers)

    def optimize(self, dataset_id: str, job_uuid: str | None = None, **changes: Any) -> httpx.Response:
        return self.post("preference-optimize", dpo(dataset_id, job_uuid, self.release) | changes)

    def fine_tune(self, dataset_id: str, job_uuid: str | None = None, **changes: Any) -> httpx.Response:
        return self.post("supervised-fine-tune", sft(dataset_id, job_uuid) | changes)

    def jobs(self) -> list[str]:
        answer = self.http.get(f"{self.release.prefix}/post-training/jobs")
        return [job["job_uuid"] for job in answer.raise_for_status().json()["data"]]

    def job(self, verb: str, job_uuid: str, *, in_path: bool | None = None) -> httpx.Response:
        """status, artifacts or cancel, in the release's spelling of the route or in the other one."""
        method = "POST" if verb == "cancel" else "GET"
        base = f"{self.release.prefix}/post-training"
        if self.release.job_in_path if in_path is None else in_path:
            return self.http.request(method, f"{base}/jobs/{job_uuid}/{verb}")
        if method == "POST":
            return self.http.post(f"{base}/job/{verb}", json={"job_uuid": job_uuid})
        return self.http.get(f"{base}/job/{verb}", params={"job_uuid": job_uuid})

    def status(self, job_uuid: str) -> dict[str, Any]:
        answer = self.job("status", job_uuid)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait(self, job_uuid: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + JOB_SECONDS
        while not reached(status := self.status(job_uuid)):
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
        return status

    # ---------------------------------------------------------------- client

    @contextmanager
    def client(self) -> Iterator[Callable[..., dict[str, Any]]]:
        """A function that calls the released client: ``call("post_training.job.status", job_uuid=...)``."""
        module, _, kind = self.release.client.rpartition(".")
        process = subprocess.Popen(
            [self.python, CLIENT_CALLS, module, kind, self.server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"NO_PROXY": "127.0.0.1,localhost", "HOME": str(self.server.log_file.parent)},
        )
        assert process.stdin is not None and process.stdout is not None
        sink, source = process.stdin, process.stdout

        def call(name: str, **arguments: Any) -> dict[str, Any]:
            sink.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            sink.flush()
            answer: dict[str, Any] = json.loads(source.readline())
            return answer

        try:
            yield call
        finally:
            sink.close()
            process.wait(30)
            source.close()


def ended(status: dict[str, Any]) -> bool:
    return status["status"] in ("completed", "failed", "cancelled")


def message(answer: httpx.Response) -> str:
    """What an answer says, wherever the release puts it."""
    body = answer.json()
    error = body.get("error", body)
    return str(error.get("detail") or error.get("message") or body)


def dpo(dataset_id: str, job_uuid: str | None, release: Release) -> dict[str, Any]:
    algorithms = {
        "beta": {"beta": 0.2, "loss_type": "sigmoid"},
        "reward": {"reward_scale": 0.2, "reward_clip": 0.0, "epsilon": 0.0, "gamma": 0.0},
    }
    return {
        "job_uuid": job_uuid or f"job-{uuid4().hex[:12]}",
        "finetuned_model": MODEL,
        "algorithm_config": algorithms[release.algorithm],
        "training_config": training(dataset_id),
        "hyperparam_search_config": {"seed": 7, "lora": {"rank": 4, "alpha": 8}},
        "logger_config": {},
    }


def sft(dataset_id: str, job_uuid: str | None = None) -> dict[str, Any]:
    return {
        "job_uuid": job_uuid or f"job-{uuid4().hex[:12]}",
        "model": MODEL,
        "training_config": training(dataset_id),
        "hyperparam_search_config": {"seed": 7},
        "logger_config": {},
        "algorithm_config": {
            "type": "LoRA",
            "lora_attn_modules": ["q_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
            "rank": 4,
            "alpha": 8,
        },
    }


def training(dataset_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "n_epochs": 1,
        "data_config": {"dataset_id": dataset_id, "batch_size": 2, "shuffle": True, "data_format": "dialog"},
        "optimizer_config": {
            "optimizer_type": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.01,
            "num_warmup_steps": 1,
        },
        **changes,
    }
