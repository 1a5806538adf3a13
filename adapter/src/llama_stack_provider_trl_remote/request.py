"""A Llama Stack request as the training service's create body; what has no meaning there is refused by name."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from . import compat
from .config import TrlRemoteConfig, merged
from .errors import RequestRefused

DPO_LOSSES = ("sigmoid", "hinge", "ipo")  # of Llama Stack's DPOLossType; kto_pair is no loss of TRL's DPO any more
PRECISIONS = ("bf16", "fp16", "fp32")
BODY_EXTRAS = ("seed", "suffix")  # of hyperparam_search_config, what is no TRL option at the service
JOB_UUID_LENGTH = 256  # the service's limit on client ids
FINGERPRINT = "llama_stack_request_sha256"  # metadata key; see JobPlan.fingerprint
DATASET = "llama_stack_dataset"  # metadata key
METADATA_LENGTH = 512  # characters of a metadata value in OpenAI's API


@dataclass(frozen=True)
class JobPlan:
    """What a request comes to: which datasets to upload, and the create body but for their file ids."""

    job_uuid: str
    dataset_id: str
    validation_dataset_id: str | None
    body: dict[str, Any]

    def fingerprint(self, training_sha256: str, validation_sha256: str | None) -> str:
        """SHA-256 of everything that makes this request what it is, its rows included.

        File ids differ with every upload, so the service cannot tell a repeated request from another one under the
        same job_uuid; this can, and is kept in the job's metadata.
        """
        content = {"body": self.body, "training": training_sha256, "validation": validation_sha256}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def create_body(self, training_file: str, validation_file: str | None, fingerprint: str) -> dict[str, Any]:
        metadata = {FINGERPRINT: fingerprint}
        if len(self.dataset_id) <= METADATA_LENGTH:
            metadata[DATASET] = self.dataset_id
        body = {**self.body, "training_file": training_file, "metadata": metadata}
        return body if validation_file is None else {**body, "validation_file": validation_file}


def plan_dpo(request: compat.PreferenceOptimizeRequest, config: TrlRemoteConfig) -> JobPlan:
    """The job that a preference-optimize request asks for.

    Precedence: hyperparam_search_config, then the request's own fields, then the provider's training_config, then the
    service's defaults. Raises RequestRefused for anything that cannot be carried out.
    """
    if not 1 <= len(request.job_uuid) <= JOB_UUID_LENGTH:
        raise RequestRefused(f"job_uuid must have 1 to {JOB_UUID_LENGTH} characters, it has {len(request.job_uuid)}")
    training = request.training_config
    data = training.data_config
    if data is None:
        raise RequestRefused("training_config.data_config is missing: it names the dataset (dataset_id)")
    _at_least_one("training_config.n_epochs", training.n_epochs)
    _at_least_one("training_config.data_config.batch_size", data.batch_size)
    for name in ("packed", "train_on_input"):
        if getattr(data, name):
            raise RequestRefused(f"training_config.data_config.{name} has no meaning for DPO: leave it out")

    extras = dict(request.hyperparam_search_config)
    if "client_id" in extras:
        raise RequestRefused("hyperparam_search_config.client_id cannot be set: it is the job_uuid")
    multiplier = extras.pop("learning_rate_multiplier", None)
    if multiplier is not None and training.optimizer_config is not None:
        raise RequestRefused(
            "hyperparam_search_config.learning_rate_multiplier scales the default learning rate and has no effect "
            "beside training_config.optimizer_config.lr: send one of them"
        )

    hyperparameters: dict[str, Any] = {"n_epochs": training.n_epochs, "batch_size": data.batch_size}
    algorithm = request.algorithm_config.model_dump(mode="json", exclude_unset=True)
    beta = algorithm.get("beta", config.training_config.dpo_beta)
    if beta is not None:
        _above_zero("algorithm_config.beta", beta)
        hyperparameters["beta"] = beta
    if multiplier is not None:
        hyperparameters["learning_rate_multiplier"] = multiplier

    body: dict[str, Any] = {"model": request.finetuned_model}
    body |= {key: extras.pop(key) for key in BODY_EXTRAS if key in extras}
    body["method"] = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    options = config.training_config.trl_options()
    for group in (_training(training), _optimizer(training.optimizer_config), _efficiency(training.efficiency_config)):
        options = merged(options, group)
    options = merged(options, _loss(algorithm))
    options = merged(options, _logging(request.logger_config))
    body["trl"] = {**merged(options, extras), "client_id": request.job_uuid}
    return JobPlan(request.job_uuid, data.dataset_id, data.validation_dataset_id, body)


def _training(training: Any) -> dict[str, Any]:
    """Fields of TrainingConfig and DataConfig. Those with a default count only when the client sent them.

    Llama Stack's defaults are no wish of the client's: max_steps_per_epoch=1 would train a single step, and
    dtype="bf16" does not exist on every device.
    """
    sent = training.model_fields_set
    options: dict[str, Any] = {"shuffle": training.data_config.shuffle}
    if "gradient_accumulation_steps" in sent:
        _at_least_one("training_config.gradient_accumulation_steps", training.gradient_accumulation_steps)
        options["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    if "max_steps_per_epoch" in sent:
        options["max_steps_per_epoch"] = _cap("training_config.max_steps_per_epoch", training.max_steps_per_epoch)
    if "max_validation_steps" in sent:
        options["evaluation"] = {
            "max_steps": _cap("training_config.max_validation_steps", training.max_validation_steps)
        }
    if "dtype" in sent and training.dtype is not None:
        if training.dtype not in PRECISIONS:
            raise RequestRefused(
                f"training_config.dtype {training.dtype!r} is unknown: use one of {', '.join(PRECISIONS)}, or leave "
                "it out to let the service choose"
            )
        options["precision"] = training.dtype
    return options


def _optimizer(optimizer: Any | None) -> dict[str, Any]:
    if optimizer is None:
        return {}
    _above_zero("training_config.optimizer_config.lr", optimizer.lr)
    return {
        "optimizer": {
            "name": optimizer.optimizer_type.value,
            "learning_rate": optimizer.lr,
            "weight_decay": _finite("training_config.optimizer_config.weight_decay", optimizer.weight_decay),
        },
        "scheduler": {"warmup_steps": optimizer.num_warmup_steps},
    }


def _efficiency(efficiency: Any | None) -> dict[str, Any]:
    if efficiency is None:
        return {}
    sent = efficiency.model_dump(exclude_unset=True, exclude_none=True)
    for name in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload"):
        if sent.get(name):
            raise RequestRefused(
                f"training_config.efficiency_config.{name} is not supported: the service does not train with FSDP"
            )
    names = {
        "enable_activation_checkpointing": "gradient_checkpointing",
        "enable_activation_offloading": "activation_offloading",
    }
    return {names[name]: value for name, value in sent.items() if name in names}


def _loss(algorithm: dict[str, Any]) -> dict[str, Any]:
    """``algorithm`` holds what the client sent of DPOAlignmentConfig."""
    loss = algorithm.get("loss_type")
    if loss is None:
        return {}
    if loss not in DPO_LOSSES:
        raise RequestRefused(
            f"algorithm_config.loss_type {loss!r} is no DPO loss of TRL: use one of {', '.join(DPO_LOSSES)}, or name "
            'another of TRL\'s losses with hyperparam_search_config {"dpo": {"loss_type": [...]}}'
        )
    return {"dpo": {"loss_type": [loss]}}


def _logging(logger_config: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(logger_config) - {"logging_steps"}):
        raise RequestRefused(
            f"logger_config does not take {', '.join(unknown)}: it takes logging_steps, the optimizer steps between "
            "two metrics events"
        )
    return {"logging": {"steps": logger_config["logging_steps"]}} if logger_config else {}


def _cap(name: str, value: int | None) -> int | None:
    """A limit where -1 and null mean none."""
    if value is None or value == -1:
        return None
    if value < 1:
        raise RequestRefused(f"{name} must be at least 1, or -1 for no limit; it is {value}")
    return value


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise RequestRefused(f"{name} must be at least 1, it is {value}")


def _finite(name: str, value: float) -> float:
    # JSON has no NaN and no infinity, but Python's reader takes them.
    if not math.isfinite(value):
        raise RequestRefused(f"{name} must be a finite number, it is {value}")
    return value


def _above_zero(name: str, value: float) -> None:
    if _finite(name, value) <= 0:
        raise RequestRefused(f"{name} must be greater than 0, it is {value}")
