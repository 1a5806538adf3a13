"""Llama Stack's post_training API as this package speaks it on every release: bodies, answers, methods.

The shapes are Llama Stack's, with three differences that make nothing a silent guess: a field that was not sent is
told from one that was (``model_fields_set``), unknown keys are refused by name, and preference_optimize takes every
algorithm_config that a release of Llama Stack or of its client has ever sent.
"""

from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataConfig(Body):
    dataset_id: str = Field(
        description="A registered dataset, the id of a file uploaded to the training service, or a URI it may read."
    )
    batch_size: int = Field(description="Rows in one forward pass.")
    shuffle: bool = Field(description="Whether each epoch has an order of its own.")
    data_format: Literal["instruct", "dialog"] = Field(description="Either; the rows' own shape decides.")
    validation_dataset_id: str | None = Field(default=None, description="Rows that are scored, not trained on.")
    packed: bool | None = Field(default=None, description="Several rows in one sequence; supervised fine-tuning only.")
    train_on_input: bool | None = Field(
        default=None, description="Loss on the prompt too; supervised fine-tuning only."
    )


class OptimizerConfig(Body):
    optimizer_type: Literal["adam", "adamw", "sgd"]
    lr: float = Field(description="Peak learning rate.")
    weight_decay: float
    num_warmup_steps: int


class EfficiencyConfig(Body):
    enable_activation_checkpointing: bool | None = None
    enable_activation_offloading: bool | None = None
    memory_efficient_fsdp_wrap: bool | None = Field(default=None, description="Refused when true.")
    fsdp_cpu_offload: bool | None = Field(default=None, description="Refused when true.")


class TrainingConfig(Body):
    n_epochs: int
    max_steps_per_epoch: int | None = Field(
        default=None, description="Optimizer steps per epoch at most. Left out, null or -1: no limit."
    )
    gradient_accumulation_steps: int | None = Field(default=None, description="Left out: the service's default, 1.")
    max_validation_steps: int | None = Field(
        default=None, description="Batches in one evaluation at most. Left out, null or -1: no limit."
    )
    data_config: DataConfig | None = None
    optimizer_config: OptimizerConfig | None = None
    efficiency_config: EfficiencyConfig | None = None
    dtype: str | None = Field(default=None, description="bf16, fp16 or fp32. Left out: what the device has.")


class LoraFinetuningConfig(Body):
    """Train a low-rank adapter. For preference_optimize: DPO through it, with the provider's DPO defaults."""

    type: Literal["LoRA"] = "LoRA"
    lora_attn_modules: list[str]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool
    rank: int
    alpha: int
    use_dora: bool | None = None
    quantize_base: bool | None = Field(default=None, description="Keep the base model in 4 bits.")


class QATFinetuningConfig(Body):
    """Quantization-aware training: refused, the service has none."""

    type: Literal["QAT"] = "QAT"
    quantizer_name: str
    group_size: int


class DPOAlignmentConfig(Body):
    """DPO since Llama Stack 0.2.16. Clients that were built for beta alone leave loss_type out."""

    beta: float | None = Field(default=None, description="Left out: the provider's dpo_beta.")
    loss_type: str | None = Field(default=None, description="sigmoid, hinge or ipo; kto_pair is refused.")


class RewardAlignmentConfig(Body):
    """DPO up to Llama Stack 0.2.15. DPO has none of these values but gamma and epsilon as two unused numbers."""

    reward_scale: float = Field(description="DPO's beta: the reward is beta times the log-ratio.")
    reward_clip: float = Field(description="Refused unless 0: DPO does not clip rewards.")
    epsilon: float = Field(description="Label smoothing, as in conservative DPO; from 0 to below 0.5.")
    gamma: float = Field(description="Refused unless 0 or 1: DPO has no discount and no reward margin.")


def _algorithm(value: Any) -> str:
    sent = value if isinstance(value, dict) else vars(value)
    if sent.get("type") == "QAT" or "quantizer_name" in sent:
        return "QAT"
    if sent.get("type") == "LoRA" or "lora_attn_modules" in sent:
        return "LoRA"
    return "reward" if sent.keys() & {"reward_scale", "reward_clip", "epsilon", "gamma"} else "DPO"


PreferenceAlgorithm = Annotated[
    Annotated[DPOAlignmentConfig, Tag("DPO")]
    | Annotated[RewardAlignmentConfig, Tag("reward")]
    | Annotated[LoraFinetuningConfig, Tag("LoRA")]
    | Annotated[QATFinetuningConfig, Tag("QAT")],
    Discriminator(_algorithm),
]
SupervisedAlgorithm = Annotated[LoraFinetuningConfig | QATFinetuningConfig, Field(discriminator="type")]


class PreferenceOptimizeRequest(Body):
    job_uuid: str = Field(description="Your id of the job. The same request under the same id is the same job.")
    finetuned_model: str = Field(description="The base model to train.")
    algorithm_config: PreferenceAlgorithm
    training_config: TrainingConfig
    hyperparam_search_config: dict[str, Any] = Field(description="The training service's TRL options.")
    logger_config: dict[str, Any] = Field(description="logging_steps, and nothing else.")


class SupervisedFineTuneRequest(Body):
    job_uuid: str = Field(description="Your id of the job. The same request under the same id is the same job.")
    training_config: TrainingConfig
    hyperparam_search_config: dict[str, Any] = Field(description="The training service's TRL options.")
    logger_config: dict[str, Any] = Field(description="logging_steps, and nothing else.")
    model: str | None = Field(default=None, description="The base model to train.")
    checkpoint_dir: str | None = Field(
        default=None, description="Refused: the service keeps checkpoints in the job's own folder."
    )
    algorithm_config: SupervisedAlgorithm | None = None


class JobRequest(Body):
    """Status, cancel and artifacts."""

    job_uuid: str


class JobStatus(Enum):
    completed = "completed"
    in_progress = "in_progress"
    failed = "failed"
    scheduled = "scheduled"
    cancelled = "cancelled"


class PostTrainingMetric(BaseModel):
    """Losses at a checkpoint. Null: not measured, or of no meaning (DPO has no perplexity)."""

    epoch: int
    train_loss: float | None
    validation_loss: float | None
    perplexity: float | None


class Checkpoint(BaseModel):
    identifier: str
    created_at: datetime
    epoch: int
    post_training_job_id: str
    path: str
    training_metrics: PostTrainingMetric | None = None


class PostTrainingJob(BaseModel):
    job_uuid: str


class ListPostTrainingJobsResponse(BaseModel):
    data: list[PostTrainingJob]


class PostTrainingJobStatusResponse(BaseModel):
    job_uuid: str
    status: JobStatus
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    resources_allocated: dict[str, Any] | None = None
    checkpoints: list[Checkpoint] = []


class PostTrainingJobArtifactsResponse(BaseModel):
    job_uuid: str
    checkpoints: list[Checkpoint] = []


@runtime_checkable
class PostTraining(Protocol):
    """The API's methods, each with one request object."""

    async def supervised_fine_tune(self, request: SupervisedFineTuneRequest) -> PostTrainingJob: ...

    async def preference_optimize(self, request: PreferenceOptimizeRequest) -> PostTrainingJob: ...

    async def get_training_jobs(self) -> ListPostTrainingJobsResponse: ...

    async def get_training_job_status(self, request: JobRequest) -> PostTrainingJobStatusResponse: ...

    async def cancel_training_job(self, request: JobRequest) -> None: ...

    async def get_training_job_artifacts(self, request: JobRequest) -> PostTrainingJobArtifactsResponse: ...
