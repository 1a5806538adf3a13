"""The part of TRL's configuration that all methods share."""

from typing import Any, Literal

from bento_service.training.devices import Device, choose_tf32
from bento_service.training.rank import TIMEOUT_SECONDS
from bento_service.training.run_directory import RunDirectory
from bento_service.training.spec import TrainingSpec

# TRL's names of the optimizers. adamw is TRL's own default; adam is AdamW without weight decay, which is Adam.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adam": "adamw_torch_fused", "sgd": "sgd"}

# ZeRO-3; "auto" is what transformers fills in from the other arguments. Saved models are whole.
DEEPSPEED_CONFIG = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def shared_arguments(
    spec: TrainingSpec, run: RunDirectory, device: Device, precision: Literal["bf16", "fp16", "fp32"]
) -> dict[str, Any]:
    """Keyword arguments of DPOConfig, SFTConfig and their like; a recipe adds its objective.

    Raises InvalidRequest for options that the device cannot fulfil.
    """
    options = spec.options
    return {
        "output_dir": str(run.checkpoints),
        "seed": spec.seed,
        "use_cpu": device.kind == "cpu",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "tf32": choose_tf32(options.tf32, device),
        # The data
        "max_length": options.max_length,
        "train_sampling_strategy": "random" if options.shuffle else "sequential",
        "per_device_train_batch_size": spec.batch_size // spec.ranks,
        "per_device_eval_batch_size": (options.evaluation.batch_size or spec.batch_size) // spec.ranks,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "dataloader_pin_memory": device.kind == "cuda",
        # The optimizer
        "optim": OPTIMIZERS[options.optimizer.name],
        "learning_rate": spec.learning_rate,
        "weight_decay": options.optimizer.decay,
        "max_grad_norm": options.optimizer.max_grad_norm,
        "lr_scheduler_type": options.scheduler.name,
        "warmup_steps": options.scheduler.warmup_ratio
        if options.scheduler.warmup_steps is None
        else options.scheduler.warmup_steps,
        # Memory
        "gradient_checkpointing": options.gradient_checkpointing,
        "activation_offloading": options.activation_offloading,
        # Several devices
        "ddp_backend": "gloo" if spec.ranks > 1 and device.kind == "cpu" else None,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # they are constants; ranks whose batches have other numbers of rows differ
        "ddp_timeout": TIMEOUT_SECONDS,
        # Evaluating and saving are asked for by ScheduleCallback; old checkpoints are deleted by EventsCallback,
        # because the Trainer would delete one before the next is known to be whole.
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": options.logging.steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "disable_tqdm": True,
        **_in_parts(spec),
    }


def _in_parts(spec: TrainingSpec) -> dict[str, Any]:
    """Arguments of a model that is divided among the devices."""
    if spec.distribution == "fsdp":
        return {
            "fsdp": True,
            # Checkpoints are whole: what is handed out is a model like any other.
            "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
            # Gradients that wait for the next micro-batch would be the whole model's on each device.
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        }
    if spec.distribution == "deepspeed":
        return {"deepspeed": DEEPSPEED_CONFIG}
    return {}
