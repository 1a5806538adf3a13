"""A Llama Stack request as the training service's create body; what has no meaning there is refused by name."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from .algorithm import algorithm_of
from .checks import above_zero, at_least_one, cap, finite
from .config import TrlRemoteConfig, merged
from .errors import RequestRefused
from .protocol import (
    DataConfig,
    EfficiencyConfig,
    OptimizerConfig,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
    TrainingConfig,
)

PRECISIONS = ("bf16", "fp16", "fp32")
BODY_EXTRAS = ("seed", "suffix")  # of hyperparam_search_config, what is no TRL option at the service
JOB_UUID_LENGTH = 256  # the service's limit on client ids
FINGERPRINT = "llama_stack_request_sha256"  # metadata key; see JobPlan.fingerprint
DATASET = "llama_stack_dataset"  # metadata key
METADATA_LENGTH = 512  # characters of a metadata value in OpenAI's API


@dataclass(frozen=True)
class JobPlan:
    """What a request comes to: which datasets to hand over, and the create body but for their file ids."""

    job_uuid: str
    dataset_id: str
    validation_dataset_id: str | None
    body: dict[str, Any]

    def fingerprint(self, training: str, validation: str | None) -> str:
        """SHA-256 of everything that makes this request what it is. ``training`` and ``validation`` say which data.

        File ids differ with every upload, so the service cannot tell a repeated request from another one under the
        same job_uuid; this can, and is kept in the job's metadata.
        """
        content = {"body": self.body, "training": training, "validation": validation}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def create_body(self, training_file: str, validation_file: str | None, fingerprint: str) -> dict[str, Any]:
        metadata = {FINGERPRINT: fingerprint}
        if len(self.dataset_id) <= METADATA_LENGTH:
            metadata[DATASET] = self.dataset_id
        body = {**self.body, "training_file": training_file, "metadata": metadata}
        return body if validation_file is None else {**body, "validation_file": validation_file}


def plan_dpo(request: PreferenceOptimizeRequest, config: TrlRemoteConfig) -> JobPlan:
    """The job that a preference-optimize request asks for.

    Precedence: hyperparam_search_config, then the request's own fields, then the provider's training_config, then the
    service's defaults. Raises RequestRefused, or NotSupported, for anything that cannot be carried out.
    """
    data = _data(request.training_config)
    for name in ("packed", "train_on_input"):
        if getattr(data, name):
            raise RequestRefused(f"training_config.data_config.{name} has no meaning for DPO: leave it out")
    algorithm = algorithm_of(request.algorithm_config)
    beta = algorithm.beta or config.training_config.dpo_beta
    hyperparameters = {} if beta is None else {"beta": beta}
    options = merged(config.training_config.trl_options("dpo"), algorithm.options)
    return _plan(request, request.finetuned_model, "dpo", hyperparameters, options)


def plan_sft(request: SupervisedFineTuneRequest, config: TrlRemoteConfig) -> JobPlan:
    """The job that a supervised-fine-tune request asks for; precedence and errors as in ``plan_dpo``."""
    data = _data(request.training_config)
    if not request.model:
        raise RequestRefused("model is missing: it names the base model to train")
    if request.checkpoint_dir is not None:
        raise RequestRefused(
            "checkpoint_dir is not supported: the service keeps checkpoints in the job's own folder and hands them "
            "out over HTTP; leave it out"
        )
    details: dict[str, Any] = {}
    if data.packed is not None:
        details["packing"] = data.packed
    if data.train_on_input is not None:
        details["completion_only_loss"] = not data.train_on_input
    options = merged(config.training_config.trl_options("supervised"), algorithm_of(request.algorithm_config).options)
    if details:
        options = merged(options, {"sft": details})
    return _plan(request, request.model, "supervised", {}, options)


def _plan(
    request: PreferenceOptimizeRequest | SupervisedFineTuneRequest,
    model: str,
    method: str,
    hyperparameters: dict[str, Any],
    options: dict[str, Any],
) -> JobPlan:
    """What both kinds of request share. ``options`` lie under the request's own."""
    if not 1 <= len(request.job_uuid) <= JOB_UUID_LENGTH:
        raise RequestRefused(f"job_uuid must have 1 to {JOB_UUID_LENGTH} characters, it has {len(request.job_uuid)}")
    training = request.training_config
    data = _data(training)
    hyperparameters = {
        "n_epochs": at_least_one("training_config.n_epochs", training.n_epochs),
        "batch_size": at_least_one("training_config.data_config.batch_size", data.batch_size),
        **hyperparameters,
    }
    extras = dict(request.hyperparam_search_config)
    if "client_id" in extras:
        raise RequestRefused("hyperparam_search_config.client_id cannot be set: it is the job_uuid")
    multiplier = extras.pop("learning_rate_multiplier", None)
    if multiplier is not None:
        if training.optimizer_config is not None:
            raise RequestRefused(
                "hyperparam_search_config.learning_rate_multiplier scales the default learning rate and has no effect "
                "beside training_config.optimizer_config.lr: send one of them"
            )
        hyperparameters["learning_rate_multiplier"] = multiplier

    body: dict[str, Any] = {"model": model}
    body |= {key: extras.pop(key) for key in BODY_EXTRAS if key in extras}
    body["method"] = {"type": method, method: {"hyperparameters": hyperparameters}}
    for group in (
        _training(training, data),
        _optimizer(training.optimizer_config),
        _efficiency(training.efficiency_config),
        _logging(request.logger_config),
        extras,
    ):
        options = merged(options, group)
    body["trl"] = {**options, "client_id": request.job_uuid}
    return JobPlan(request.job_uuid, data.dataset_id, data.validation_dataset_id, body)


def _data(training: TrainingConfig) -> DataConfig:
    if training.data_config is None:
        raise RequestRefused("training_config.data_config is missing: it names the dataset (dataset_id)")
    return training.data_config


def _training(training: TrainingConfig, data: DataConfig) -> dict[str, Any]:
    """Fields of TrainingConfig and DataConfig. Those with a default count only when the client sent them.

    Llama Stack's defaults are no wish of the client's: max_steps_per_epoch=1 would train a single step, and
    dtype="bf16" does not exist on every device.
    """
    sent = training.model_fields_set
    options: dict[str, Any] = {"shuffle": data.shuffle}
    if training.gradient_accumulation_steps is not None and "gradient_accumulation_steps" in sent:
        options["gradient_accumulation_steps"] = at_least_one(
            "training_config.gradient_accumulation_steps", training.gradient_accumulation_steps
        )
    if "max_steps_per_epoch" in sent:
        options["max_steps_per_epoch"] = cap("training_config.max_steps_per_epoch", training.max_steps_per_epoch)
    if "max_validation_steps" in sent:
        options["evaluation"] = {
            "max_steps": cap("training_config.max_validation_steps", training.max_validation_steps)
        }
    if "dtype" in sent and training.dtype is not None:
        if training.dtype not in PRECISIONS:
            raise RequestRefused(
                f"training_config.dtype {training.dtype!r} is unknown: use one of {', '.join(PRECISIONS)}, or leave "
                "it out to let the service choose"
            )
        options["precision"] = training.dtype
    return options


def _optimizer(optimizer: OptimizerConfig | None) -> dict[str, Any]:
    if optimizer is None:
        return {}
    return {
        "optimizer": {
            "name": optimizer.optimizer_type,
            "learning_rate": above_zero("training_config.optimizer_config.lr", optimizer.lr),
            "weight_decay": finite("training_config.optimizer_config.weight_decay", optimizer.weight_decay),
        },
        "scheduler": {"warmup_steps": optimizer.num_warmup_steps},
    }


def _efficiency(efficiency: EfficiencyConfig | None) -> dict[str, Any]:
    if efficiency is None:
        return {}
    for name in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload"):
        if getattr(efficiency, name):
            raise RequestRefused(
                f"training_config.efficiency_config.{name} is not supported: the service does not train with FSDP"
            )
    names = {
        "enable_activation_checkpointing": "gradient_checkpointing",
        "enable_activation_offloading": "activation_offloading",
    }
    sent = efficiency.model_dump(exclude_unset=True, exclude_none=True)
    return {names[name]: value for name, value in sent.items() if name in names}


def _logging(logger_config: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(logger_config) - {"logging_steps"}):
        raise RequestRefused(
            f"logger_config does not take {', '.join(unknown)}: it takes logging_steps, the optimizer steps between "
            "two metrics events"
        )
    return {"logging": {"steps": logger_config["logging_steps"]}} if logger_config else {}
