"""A release's server in front of the real service with a tiny model: from submission to the trained model."""

from pathlib import Path

from tests.bento_server import BentoServer
from tests.compat.stack import Stack, ended, message, training


def test_dpo_until_it_is_completed(stack: Stack, service: BentoServer, submitted: dict[str, str]) -> None:
    """DPO until completed: times, metrics, evaluation, artifacts"""
    status = stack.wait(submitted["dpo"], ended)
    details = status["resources_allocated"]
    assert status["status"] == "completed", (details, service.log()[-3000:])
    assert status["scheduled_at"] <= status["started_at"] <= status["completed_at"]
    assert details["progress"]["step"] == details["progress"]["total_steps"] == 2
    assert details["metrics"]["loss"] > 0
    assert "eval_rewards/margins" in details["evaluation"]
    assert details["job_url"].endswith(details["service_job_id"])
    artifacts = stack.job("artifacts", submitted["dpo"]).json()
    (checkpoint,) = artifacts["checkpoints"]
    assert checkpoint["post_training_job_id"] == submitted["dpo"]
    assert (Path(checkpoint["path"]) / "adapter_model.safetensors").is_file()
    assert checkpoint["training_metrics"]["train_loss"] > 0
    assert checkpoint["training_metrics"]["validation_loss"] > 0
    assert checkpoint["training_metrics"]["perplexity"] is None


def test_sft_until_it_is_completed(stack: Stack, service: BentoServer, submitted: dict[str, str]) -> None:
    """SFT until completed: perplexity, artifacts"""
    status = stack.wait(submitted["sft"], ended)
    assert status["status"] == "completed", (status["resources_allocated"], service.log()[-3000:])
    (checkpoint,) = status["checkpoints"]
    assert checkpoint["training_metrics"]["perplexity"] > 1
    assert set(submitted.values()) <= set(stack.jobs())


def test_a_running_and_a_queued_job(stack: Stack, service: BentoServer, files: dict[str, str]) -> None:
    """a running and a queued job: the service goes away and comes back, both are cancelled"""
    jobs = []
    for _ in range(2):
        answer = stack.optimize(files["pairs"], training_config=training(files["pairs"], n_epochs=5000))
        assert answer.status_code == 200, answer.text
        jobs.append(answer.json()["job_uuid"])
    running, queued = jobs
    seen = stack.wait(running, lambda s: s["resources_allocated"]["progress"]["step"] > 0)
    assert seen["status"] == "in_progress"
    assert stack.status(queued)["status"] == "scheduled"
    assert stack.status(queued)["resources_allocated"]["queue_position"] == 1
    stack.switch.to(None)
    for answer in (stack.job("status", running), stack.optimize(files["pairs"])):
        assert answer.status_code == 502, answer.text
        assert "cannot be reached" in message(answer)
    stack.switch.to(service.url)
    assert stack.status(running)["status"] == "in_progress"
    for job in (queued, running):
        assert stack.job("cancel", job).status_code == 200
        assert stack.wait(job, ended)["status"] == "cancelled"
    late = stack.job("cancel", running)
    assert late.status_code in (200, 409), late.text
