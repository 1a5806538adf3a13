"""Several devices for one job: what a request may ask of them, and how they share the training."""

from importlib.util import find_spec

from bento_service.errors import InvalidRequest, ResourcesExceeded
from bento_service.jobs.devices import Devices, device_memory, has_bf16
from bento_service.jobs.job import JobRequest
from bento_service.training.memory import ComputePrecision, estimate
from bento_service.training.model_shape import ModelShape
from bento_service.training.spec import COUPLED_LOSSES, Distribution, TrainingSpec

# Of a device's memory, what the model with all that belongs to it may take for each device to hold a whole one. The
# rest is for activations, which are not known before the data has been read.
_WHOLE_MODEL_FILL = 0.8


def require_shareable(request: JobRequest, devices: Devices) -> None:
    """Raises InvalidRequest for a job that the devices it asks for cannot share, or not exactly."""
    options, count = request.options, request.options.devices
    if count == 1:
        if options.distribution != "auto":
            raise InvalidRequest(
                f"trl.distribution {options.distribution} needs trl.devices of 2 or more: leave it out.",
                param="trl.distribution",
            )
        return
    _require_available(request, devices)
    batch = f"method.{request.method}.hyperparameters.batch_size"
    for size, param in ((request.batch_size, batch), (options.evaluation.batch_size, "trl.evaluation.batch_size")):
        if size is not None and size % count:
            nearest = [str(multiple) for multiple in (size // count * count, (size // count + 1) * count) if multiple]
            raise InvalidRequest(
                f"{param} is {size}, which {count} devices cannot share equally: use {' or '.join(nearest)}.",
                param=param,
            )
    if request.method == "kto" and options.kto.loss_type == "kto" and request.batch_size == count:
        raise InvalidRequest(
            f"kto needs 2 rows or more on each of {count} devices: use a batch_size of {2 * count}, or "
            'trl.kto.loss_type "apo_zero_unpaired".',
            param=batch,
        )
    if request.method == "dpo" and (coupled := sorted(COUPLED_LOSSES & set(options.dpo.loss_type))):
        raise InvalidRequest(
            f"trl.dpo.loss_type {', '.join(coupled)} is computed over a whole batch, which several devices do not "
            "have: use one device.",
            param="trl.dpo.loss_type",
        )


def _require_available(request: JobRequest, devices: Devices) -> None:
    options = request.options
    if options.distribution in ("fsdp", "deepspeed"):
        if devices.kind != "cuda":
            raise ResourcesExceeded(
                f"trl.distribution {options.distribution} needs GPUs, and this host trains on its "
                f"{devices.kind.upper()}: use auto or ddp.",
                param="trl.distribution",
            )
        if options.lora.quantization is not None:
            raise InvalidRequest(
                "A quantized base model is held whole by each device: use trl.distribution ddp.",
                param="trl.distribution",
            )
    if options.distribution == "deepspeed" and find_spec("deepspeed") is None:
        raise ResourcesExceeded(
            "trl.distribution deepspeed needs DeepSpeed, which the service does not find: install the package "
            "deepspeed beside it, or use fsdp.",
            param="trl.distribution",
        )


def require_divisible(spec: TrainingSpec, shape: ModelShape | None) -> None:
    """Raises InvalidRequest for what cannot be done with a model of which each device has a part."""
    if spec.distribution not in ("fsdp", "deepspeed"):
        return
    if shape is not None and shape.packed:
        raise InvalidRequest(
            f"model {spec.model} is stored quantized, and each device holds it whole: use trl.distribution ddp.",
            param="trl.distribution",
        )
    options = spec.options
    own = {"dpo": options.dpo.precompute_ref_log_probs, "kto": options.kto.precompute_ref_log_probs}
    if own.get(spec.method):
        raise InvalidRequest(
            f"The devices share this model by {spec.distribution}, so the reference's scores cannot be computed "
            "before training: leave it out, or use trl.distribution ddp where a device has the memory.",
            param=f"trl.{spec.method}.precompute_ref_log_probs",
        )


def batch_size(default: int, devices: int) -> int:
    """The default batch size, or for devices that cannot share it equally the next one that they can."""
    return -(-default // devices) * devices


def distribution(spec: TrainingSpec, shape: ModelShape | None, devices: Devices) -> Distribution | None:
    """How a job's devices share its training; None for one device.

    ``shape`` is None where the model is not on this host: each device is then taken to hold the whole.
    """
    if spec.options.devices == 1:
        return None
    if spec.options.distribution != "auto":
        return spec.options.distribution
    whole = spec.model_copy(update={"distribution": "ddp"})
    memory = memory_of_each(whole, devices)
    quantized = spec.options.lora.quantization is not None or (shape is not None and shape.packed > 0)
    if shape is None or memory is None or devices.kind != "cuda" or quantized:
        return "ddp"
    needed = estimate(whole, shape, precision(spec, devices), devices.kind, None).total
    return "ddp" if needed <= _WHOLE_MODEL_FILL * memory else "fsdp"


def precision(spec: TrainingSpec, devices: Devices) -> ComputePrecision:
    """Of the forward and backward pass, as the trainer will choose it."""
    if spec.options.precision != "auto":
        return spec.options.precision
    return "bf16" if has_bf16(devices) else "fp32"


def memory_of_each(spec: TrainingSpec, devices: Devices) -> int | None:
    """Bytes that each of the job's processes has: a GPU's own, or its share of the host's; None: it cannot be told."""
    memory = device_memory(devices)
    return memory if memory is None or devices.kind == "cuda" else memory // spec.ranks
