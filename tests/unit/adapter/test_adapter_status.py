"""A job of the service as Llama Stack shows it."""

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from llama_stack_provider_trl_remote.errors import ServiceUnavailable
from llama_stack_provider_trl_remote.service import Checkpoint, Job
from llama_stack_provider_trl_remote.status import STATUS, checkpoint_of, job_status

from bento_service.jobs.job import JobStatus
from tests.fake_training_service import new_job


def job(**changes: Any) -> Job:
    body = {"model": "org/model", "training_file": "file-1", "trl": {"client_id": "mine"}}
    return Job.model_validate(new_job("ftjob-1", body, **changes))


def checkpoint(epoch: float) -> Checkpoint:
    return Checkpoint.model_validate(
        {
            "id": "ftckpt-1",
            "created_at": 100,
            "step_number": 4,
            "trl": {"path": "/runs/1", "epoch": epoch, "metrics": {"loss": 0.6, "eval_loss": None}},
        }
    )


@pytest.mark.parametrize(
    ("service", "stack"),
    [
        ("validating_files", "scheduled"),
        ("queued", "scheduled"),
        ("paused", "scheduled"),
        ("running", "in_progress"),
        ("succeeded", "completed"),
        ("failed", "failed"),
        ("cancelled", "cancelled"),
    ],
)
def test_states(service: str, stack: str) -> None:
    shown = job_status(job(status=service), [], "http://gpu:8080")
    assert shown.status.value == stack
    assert shown.resources_allocated["service_status"] == service


def test_every_state_of_the_service_is_known() -> None:
    assert set(STATUS) == {status.value for status in JobStatus}
    with pytest.raises(ServiceUnavailable, match="'resting'"):
        job_status(job(status="resting"), [], "http://gpu:8080")


def test_times_are_aware() -> None:
    shown = job_status(job(created_at=0, finished_at=60), [], "http://gpu:8080")
    assert shown.scheduled_at == datetime(1970, 1, 1, tzinfo=UTC)
    assert shown.started_at is None
    assert shown.completed_at == datetime(1970, 1, 1, 0, 1, tzinfo=UTC)


def test_what_llama_stack_has_no_field_for() -> None:
    error = {"code": "out_of_memory", "message": "use a smaller batch", "param": None}
    shown = job_status(job(status="failed", error=error), [checkpoint(1.0)], "http://gpu:8080")
    assert shown.job_uuid == "mine"
    assert shown.resources_allocated == {
        "service_job_id": "ftjob-1",
        "service_status": "failed",
        "job_url": "http://gpu:8080/v1/fine_tuning/jobs/ftjob-1",
        "model": "org/model",
        "fine_tuned_model": None,
        "attempt": 0,
        "wanted": None,
        "queue_position": 1,
        "estimated_finish": None,
        "progress": {"step": 0, "total_steps": None, "epoch": 0.0, "tokens": 0},
        "metrics": {},
        "baseline": {},
        "evaluation": {},
        "checkpoint_metrics": {"ftckpt-1": {"loss": 0.6, "eval_loss": None}},
        "error": error,
    }


@pytest.mark.parametrize(("epoch", "completed"), [(0.5, 0), (1.0, 1), (0.9999999, 1), (2.5, 2)])
def test_checkpoints(epoch: float, completed: int) -> None:
    shown = checkpoint_of(job(), checkpoint(epoch))
    assert (shown.epoch, shown.path, shown.post_training_job_id) == (completed, "/runs/1", "mine")
    assert shown.training_metrics is not None
    metrics = shown.training_metrics.model_dump()
    assert metrics == {"epoch": completed, "train_loss": 0.6, "validation_loss": None, "perplexity": None}


def test_perplexity_is_of_the_validation_loss_and_only_of_supervised_training() -> None:
    supervised = job(method={"type": "supervised"})
    for values, perplexity in (({"loss": 1.0}, math.e), ({"loss": 1.0, "eval_loss": 0.0}, 1.0), ({"loss": 1e6}, None)):
        one = checkpoint(1.0)
        one = one.model_copy(update={"trl": one.trl.model_copy(update={"metrics": values})})
        shown = checkpoint_of(supervised, one).training_metrics
        assert shown is not None
        assert shown.perplexity == (None if perplexity is None else pytest.approx(perplexity))
