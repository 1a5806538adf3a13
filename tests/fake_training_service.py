"""A stand-in for the training service in tests of the adapter: its HTTP contract, and no training.

Jobs stay queued until a test changes them. Rows need ``chosen`` and ``rejected``; a model named ``missing/...`` is
unknown.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import JSONResponse, Response


class FakeTrainingService:
    """``app`` serves it; tests look at ``files``, ``bodies`` and ``deleted``, and edit ``jobs``."""

    def __init__(self, api_key: str | None = None, device: str = "cpu") -> None:
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}  # oldest first
        self.bodies: dict[str, dict[str, Any]] = {}  # create bodies by job id
        self.checkpoints: dict[str, list[dict[str, Any]]] = {}
        self.deleted: list[str] = []
        self.imported: list[str] = []  # URLs; none is allowed unless ``importable`` has it
        self.importable: dict[str, bytes] = {}
        self.table = b""  # what GET /table.csv answers: a table somewhere on the web
        self.headers: list[dict[str, str]] = []  # of each request
        self._api_key = api_key
        self._device = device
        self._uploads = 0
        self.app = self._make_app()

    def add_checkpoint(self, job_id: str, step: int, epoch: float, **metrics: float) -> None:
        self.checkpoints.setdefault(job_id, []).append(
            {
                "id": f"ftckpt-{job_id}-{step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": 1_700_000_000 + step,
                "fine_tuned_model_checkpoint": "ft:model",
                "fine_tuning_job_id": job_id,
                "step_number": step,
                "metrics": {"step": step},
                "trl": {
                    "path": f"/runs/{job_id}/{step}",
                    "bytes": 1,
                    "final": False,
                    "epoch": epoch,
                    "metrics": metrics,
                },
            }
        )

    def _make_app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Any:
            self.headers.append(dict(request.headers))
            if (
                self._api_key
                and request.url.path != "/table.csv"
                and request.headers.get("Authorization") != f"Bearer {self._api_key}"
            ):
                return _error(401, "Incorrect API key provided", code="invalid_api_key")
            return await call_next(request)

        @app.get("/health")
        def health() -> Any:
            return {"status": "healthy", "service": "trl-training-service", "device": self._device}

        @app.get("/table.csv")
        def table() -> Any:
            return Response(self.table, media_type="text/csv")

        @app.post("/v1/files")
        def upload(file: UploadFile) -> Any:
            return self._store(file.file.read())

        @app.post("/v1/files/import")
        def import_url(body: dict[str, Any]) -> Any:
            self.imported.append(body["url"])
            if body["url"] not in self.importable:
                return _error(
                    403, f"{body['url']} is not among the URLs that this service imports", code="import_refused"
                )
            return self._store(self.importable[body["url"]])

        @app.get("/v1/files")
        def list_files(sha256: str | None = None, limit: int = 20) -> Any:
            files = [self._file(file_id) for file_id in reversed(self.files)]
            return _page([file for file in files if sha256 in (None, file["trl"]["sha256"])], None, limit)

        @app.delete("/v1/files/{file_id}")
        def delete(file_id: str) -> Any:
            if any(file_id in (job["training_file"], job["validation_file"]) for job in self.jobs.values()):
                return _error(409, f"File {file_id} is in use", code="conflict")
            del self.files[file_id]
            self.deleted.append(file_id)
            return {"id": file_id, "object": "file", "deleted": True}

        @app.post("/v1/fine_tuning/jobs")
        def create(body: dict[str, Any]) -> Any:
            client_id = body["trl"]["client_id"]
            for job in self.jobs.values():
                if job["trl"]["client_id"] == client_id:
                    if self.bodies[job["id"]] == body:
                        return job
                    return _error(409, f"client_id {client_id} is taken", code="client_id_conflict")
            if body["model"].startswith("missing/"):
                return _error(400, f"Model {body['model']} was not found", param="model", code="model_not_found")
            if body["training_file"] not in self.files:
                return _error(400, f"There is no file {body['training_file']}", param="training_file")
            if body["method"]["type"] == "dpo" and (problems := _problems(self.files[body["training_file"]])):
                return _error(
                    400, f"{len(problems)} bad rows", param="training_file", code="invalid_dataset", problems=problems
                )
            job_id = f"ftjob-{len(self.jobs) + 1:024x}"
            self.bodies[job_id] = body
            self.jobs[job_id] = new_job(job_id, body)
            return self.jobs[job_id]

        @app.get("/v1/fine_tuning/jobs")
        def list_jobs(after: str | None = None, limit: int = 20, client_id: str | None = None) -> Any:
            jobs = [j for j in reversed(self.jobs.values()) if client_id in (None, j["trl"]["client_id"])]
            return _page(jobs, after, limit)

        @app.get("/v1/fine_tuning/jobs/{job_id}")
        def retrieve(job_id: str) -> Any:
            return self.jobs.get(job_id) or _error(404, f"There is no job {job_id}", code="not_found")

        @app.post("/v1/fine_tuning/jobs/{job_id}/cancel")
        def cancel(job_id: str) -> Any:
            job = self.jobs[job_id]
            if job["status"] in ("succeeded", "failed"):
                return _error(409, f"Job {job_id} has already {job['status']}", code="transition_refused")
            job.update(status="cancelled", finished_at=int(time.time()))
            return job

        @app.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
        def list_checkpoints(job_id: str, after: str | None = None, limit: int = 10) -> Any:
            return _page(list(reversed(self.checkpoints.get(job_id, []))), after, limit)

        return app

    def _store(self, content: bytes) -> dict[str, Any]:
        self._uploads += 1
        file_id = f"file-{self._uploads:024x}"
        self.files[file_id] = content
        return self._file(file_id)

    def _file(self, file_id: str) -> dict[str, Any]:
        content = self.files[file_id]
        return {
            "id": file_id,
            "object": "file",
            "bytes": len(content),
            "created_at": 1_700_000_000,
            "filename": "data",
            "purpose": "fine-tune",
            "status": "processed",
            "trl": {"sha256": hashlib.sha256(content).hexdigest()},
        }

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serve on a free port of this host, in a thread; yields the address."""
        server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the fake training service did not start")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the fake training service did not stop"


def new_job(job_id: str, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A queued job as the service answers it."""
    job = {
        "id": job_id,
        "object": "fine_tuning.job",
        "model": body["model"],
        "created_at": 1_700_000_000,
        "finished_at": None,
        "estimated_finish": None,
        "status": "queued",
        "error": None,
        "fine_tuned_model": None,
        "trained_tokens": None,
        "training_file": body["training_file"],
        "validation_file": body.get("validation_file"),
        "seed": body.get("seed", 42),
        "metadata": body.get("metadata", {}),
        "method": body.get("method"),
        "result_files": [],
        "trl": {
            "client_id": body.get("trl", {}).get("client_id"),
            "queued_at": 1_700_000_000,
            "started_at": None,
            "attempt": 0,
            "queue_position": 1,
            "priority": 0,
            "devices": 1,
            "progress": {"step": 0, "total_steps": None, "epoch": 0.0, "tokens": 0, "metrics": {}},
            "options": body.get("trl", {}),
        },
    }
    return {**job, **changes}


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    start = 0 if after is None else [item["id"] for item in items].index(after) + 1
    return {"object": "list", "data": items[start : start + limit], "has_more": start + limit < len(items)}


def _problems(content: bytes) -> list[dict[str, Any]]:
    """Of JSON Lines; anything else passes."""
    if not content.startswith(b"{"):
        return []
    return [
        {"row": number, "field": missing, "code": "missing", "message": "is missing", "value": None}
        for number, line in enumerate(content.splitlines(), 1)
        for missing in sorted({"chosen", "rejected"} - json.loads(line).keys())
    ]


def _error(status: int, message: str, param: str | None = None, code: str | None = None, **more: Any) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code, **more}
    return JSONResponse({"error": error}, status_code=status)
