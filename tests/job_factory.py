"""Jobs for tests, with only what a test cares about spelled out."""

import secrets
import time
from dataclasses import replace
from typing import Any

from bento_service.jobs.job import Job, JobRequest, JobStatus, StoredFile
from bento_service.jobs.store import Store
from bento_service.training.spec import TrainingSpec, TrlOptions


def make_file(**changes: Any) -> StoredFile:
    values = {
        "id": f"file-{secrets.token_hex(12)}",
        "filename": "pairs.jsonl",
        "purpose": "fine-tune",
        "bytes": 12,
        "sha256": secrets.token_hex(32),
        "created_at": time.time(),
    }
    return StoredFile(**(values | changes))


def make_job(training_file: str = "file-1", *, options: dict[str, Any] | None = None, **changes: Any) -> Job:
    """A queued job, not stored yet; ``changes`` go to the request where they are its fields, else to the job."""
    trl = TrlOptions.model_validate(options or {})
    in_request = {key: changes.pop(key) for key in list(changes) if key in JobRequest.__dataclass_fields__}
    request = JobRequest(**({"model": "org/tiny", "training_file": training_file, "options": trl} | in_request))
    job_id = changes.pop("id", f"ftjob-{secrets.token_hex(12)}")
    spec = TrainingSpec(
        job_id=job_id,
        method="dpo",
        model=request.model,
        model_path=None,
        training_file="/nowhere/pairs.jsonl",
        validation_file=None,
        seed=0,
        beta=0.1,
        batch_size=8,
        n_epochs=1,
        learning_rate=1e-5,
        device="cpu",
        options=trl,
    )
    job = Job(
        id=job_id,
        client_id=trl.client_id,
        request=request,
        spec=spec,
        status=JobStatus.QUEUED,
        priority=trl.priority,
        devices=trl.devices,
        created_at=time.time(),
        fine_tuned_model=f"ft:{request.model}",
    )
    return replace(job, **changes)


def submit(store: Store, **changes: Any) -> Job:
    """Store a job together with the file it names."""
    file = store.add_file(make_file())
    return store.create_job(make_job(file.id, **changes))[0]
