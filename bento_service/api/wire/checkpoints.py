"""Checkpoints of a job, in the shape of OpenAI's fine-tuning API."""

from typing import Literal

from pydantic import BaseModel, Field

from bento_service.jobs.job import Checkpoint

# OpenAI's names for what TRL calls by these; the first one present counts.
_CHECKPOINT_METRICS = {
    "train_loss": ("loss", "train_loss"),
    "train_mean_token_accuracy": ("mean_token_accuracy",),
    "valid_loss": ("eval_loss",),
    "valid_mean_token_accuracy": ("eval_mean_token_accuracy",),
}


class TrlCheckpoint(BaseModel):
    path: str = Field(description="The checkpoint's folder on the service's disk, for programs that run there.")
    content: str = Field(description="Path of this API that downloads it, as a tar.")
    bytes: int = Field(description="Size of the folder's files.")
    final: bool = Field(description="Whether it holds the model after the last step.")
    epoch: float
    metrics: dict[str, float | None] = Field(description="All values at that step, under TRL's names.")


class CheckpointObject(BaseModel):
    """A complete checkpoint."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None] = Field(
        description="step, and of train_loss, train_mean_token_accuracy, valid_loss and valid_mean_token_accuracy "
        "those that were measured."
    )
    trl: TrlCheckpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint, fine_tuned_model: str) -> "CheckpointObject":
        metrics: dict[str, float | None] = {"step": checkpoint.step}
        for name, sources in _CHECKPOINT_METRICS.items():
            present = [checkpoint.metrics[source] for source in sources if source in checkpoint.metrics]
            if present:
                metrics[name] = present[0]
        return cls(
            id=checkpoint.id,
            created_at=int(checkpoint.created_at),
            fine_tuned_model_checkpoint=f"{fine_tuned_model}:ckpt-step-{checkpoint.step}",
            fine_tuning_job_id=checkpoint.job_id,
            step_number=checkpoint.step,
            metrics=metrics,
            trl=TrlCheckpoint(
                path=checkpoint.path,
                content=f"/v1/fine_tuning/jobs/{checkpoint.job_id}/checkpoints/{checkpoint.step}/content",
                bytes=checkpoint.bytes,
                final=checkpoint.final,
                epoch=checkpoint.epoch,
                metrics=checkpoint.metrics,
            ),
        )
