"""What a request must fulfil to become a job, and the specification that it then gets.

Everything that can be said without reading the data: whether the request makes sense, whether its model and files are
there, whether the host has the devices, memory and disk. Rows are checked by ``training.preferences``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bento_service.base_models import BaseModels
from bento_service.distribution import (
    batch_size,
    distribution,
    memory_of_each,
    require_divisible,
    require_shareable,
)
from bento_service.errors import InvalidRequest, NotFound, ResourcesExceeded
from bento_service.jobs.devices import Devices
from bento_service.jobs.disk import disk_need, gigabytes
from bento_service.jobs.job import JobRequest
from bento_service.settings import Settings
from bento_service.training.best import require_known
from bento_service.training.memory import estimate
from bento_service.training.model_shape import ModelShape
from bento_service.training.models import require_head
from bento_service.training.quantization import is_installed as bitsandbytes_is_installed
from bento_service.training.recipes import RECIPES
from bento_service.training.spec import LEARNING_RATES, METHOD_OPTIONS, MethodName, TrainingSpec

# What "auto" means. beta is the value of the DPO paper and of TRL; one pass, since preference data overfits early.
AUTO_BETAS: dict[MethodName, float] = {"dpo": 0.1, "kto": 0.1}
AUTO_BATCH_SIZE = 8
AUTO_EPOCHS = 1
AUTO_SEED = 42

# A job is refused when what its weights, gradients and optimizer take is more than the device has, by this factor.
MEMORY_MARGIN = 1.1

_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Verdict:
    """``spec`` is None where the model or a file is not there; ``refusals`` is all that is wrong."""

    spec: TrainingSpec | None
    refusals: tuple[InvalidRequest, ...]

    def require(self) -> TrainingSpec:
        """Raises the first refusal."""
        if self.refusals:
            raise self.refusals[0]
        assert self.spec is not None
        return self.spec


class Admission:
    """Judges requests for this host. ``data_path`` finds a file's bytes by its id, or raises NotFound."""

    def __init__(self, settings: Settings, devices: Devices, data_path: Callable[[str], Path]) -> None:
        self._settings = settings
        self._devices = devices
        self._models = BaseModels(settings)
        self._data_path = data_path

    def judge(self, request: JobRequest, job_id: str) -> Verdict:
        """Check all that can be checked without reading the data. Never raises an InvalidRequest."""
        refusals: list[InvalidRequest] = []

        def attempt[T](check: Callable[[], T]) -> T | None:
            try:
                return check()
            except InvalidRequest as error:
                refusals.append(error)
                return None

        for check in (
            _require_method,
            _require_own_options,
            _require_one_rate,
            _require_suffix,
            _require_one_held_out,
            _require_comparable,
            _require_mismatched,
            self._require_devices,
            self._require_quantization,
            lambda request: require_shareable(request, self._devices),
        ):
            attempt(lambda check=check: check(request))  # type: ignore[misc]
        training_file = attempt(lambda: self._file(request.training_file, "training_file"))
        validation_file = None
        if request.validation_file is not None:
            validation_id = request.validation_file
            validation_file = attempt(lambda: self._file(validation_id, "validation_file"))
        located = attempt(lambda: (self._models.locate(request.model),))
        if training_file is None or located is None or (request.validation_file and validation_file is None):
            return Verdict(None, tuple(refusals))
        whole = resolve_spec(
            request,
            job_id=job_id,
            model_path=located[0],
            training_file=training_file,
            validation_file=validation_file,
            device=self._settings.device,
            reference_cache=self._settings.reference_cache_path,
        )
        shape = None
        if whole.model_path is not None:
            folder = Path(whole.model_path)
            if (shape := attempt(lambda: ModelShape.of(folder))) is None:
                return Verdict(whole, tuple(refusals))
        spec = whole.model_copy(update={"distribution": distribution(whole, shape, self._devices)})
        attempt(lambda: require_divisible(spec, shape))
        if shape is not None:
            attempt(lambda: self._require_trainable(spec, shape))
        attempt(lambda: self._require_disk(spec))
        return Verdict(spec, tuple(refusals))

    def _require_devices(self, request: JobRequest) -> None:
        here = self._devices
        wanted = request.options.devices
        if here.count == 0:
            raise ResourcesExceeded(
                "TRL_DEVICE is cuda, but this host has 0 GPUs: set TRL_DEVICE=auto or cpu on the service.",
                param="trl.devices",
            )
        if wanted > here.count:
            more = ", or raise TRL_CPU_SLOTS on the service" if here.kind == "cpu" else ""
            raise ResourcesExceeded(
                f"The job asks for {wanted} devices and this host has {here.describe()}: ask for fewer{more}.",
                param="trl.devices",
            )
        if request.options.precision == "fp16" and here.kind == "cpu":
            raise ResourcesExceeded(
                "precision fp16 needs a GPU, and this host trains on its CPU: use auto, fp32 or bf16.",
                param="trl.precision",
            )
        if request.options.tf32 and here.kind != "cuda":
            raise ResourcesExceeded(
                f"tf32 needs an NVIDIA GPU, and this host trains on {here.describe()}: leave it out.", param="trl.tf32"
            )

    def _require_quantization(self, request: JobRequest) -> None:
        options, param = request.options, "trl.lora.quantization"
        if options.lora.quantization is None:
            return
        if options.tuning == "full":
            raise InvalidRequest(
                'lora.quantization is for weights that stay as they are, and trl.tuning "full" trains all of them: '
                'use "lora".',
                param=param,
            )
        if self._devices.kind == "mps":
            raise ResourcesExceeded(
                f"lora.quantization trains on CUDA GPUs and CPUs only, and this host has {self._devices.describe()}: "
                "leave it out.",
                param=param,
            )
        if not bitsandbytes_is_installed():
            raise ResourcesExceeded(
                "lora.quantization needs bitsandbytes, which the service does not find: install trl-remote[qlora] "
                "there, or leave it out.",
                param=param,
            )

    def _require_trainable(self, spec: TrainingSpec, shape: ModelShape) -> None:
        if shape.packed and spec.options.tuning == "full":
            raise InvalidRequest(
                f"model {spec.model} is stored quantized, and such weights cannot be trained: train an adapter "
                '(trl.tuning "lora"), or name the unquantized model.',
                param="trl.tuning",
            )
        require_head(spec.model, shape.classes, labels=shape.labels, scores=spec.method == "reward")
        self._require_memory(spec, shape)

    def _require_memory(self, spec: TrainingSpec, shape: ModelShape) -> None:
        """Refuse what cannot fit whatever the data: activations are not counted, fp32 is the least that is."""
        capacity = memory_of_each(spec, self._devices)
        if not spec.options.check_memory or capacity is None:
            return
        needed = estimate(spec, shape, "fp32", self._devices.kind, None).certain
        if needed > capacity * MEMORY_MARGIN:
            advice, param = "", "model"
            if spec.options.tuning == "full":
                advice, param = 'train an adapter (trl.tuning "lora"), ', "trl.tuning"
            elif spec.options.lora.quantization is None:
                advice = 'keep the base model in 4 bits (trl.lora.quantization "nf4"), '
                param = "trl.lora.quantization"
            raise ResourcesExceeded(
                f"Weights, gradients and optimizer of the job take {gigabytes(needed)} of memory before any data, and "
                f"the device has {gigabytes(capacity)}: {advice}take a smaller model, or set trl.check_memory to "
                "false to try it all the same.",
                param=param,
            )

    def _require_disk(self, spec: TrainingSpec) -> None:
        need = disk_need(spec, self._settings.runs_path)
        if not need.fits:
            raise ResourcesExceeded(
                f"The job {need.describe()}: keep fewer checkpoints with trl.saving.total_limit (now "
                f"{spec.options.saving.total_limit}), or free some space under TRL_HOME on the service.",
                param="trl.saving.total_limit",
            )

    def _file(self, file_id: str, param: str) -> Path:
        try:
            return self._data_path(file_id)
        except NotFound as error:
            raise InvalidRequest(
                f"{error.message} Upload the data with POST /v1/files, and give the id that it answers.", param=param
            ) from error


def _require_method(request: JobRequest) -> None:
    if request.method not in RECIPES:
        raise InvalidRequest(
            f"The method {request.method} is not available in this version of the service: use "
            f"{' or '.join(RECIPES)}.",
            param="method.type",
        )


def _require_own_options(request: JobRequest) -> None:
    if others := request.options.of_other_methods(request.method):
        raise InvalidRequest(
            f"trl.{others[0]} is of another method than {request.method}: leave it out. The options of "
            f"{request.method} are in trl.{METHOD_OPTIONS[request.method]}.",
            param=f"trl.{others[0]}",
        )


def _require_one_rate(request: JobRequest) -> None:
    if request.options.optimizer.learning_rate is not None and request.learning_rate_multiplier is not None:
        raise InvalidRequest(
            "Both learning_rate_multiplier and trl.optimizer.learning_rate are given: the first scales the "
            "default rate, the second replaces it. Give one.",
            param="trl.optimizer.learning_rate",
        )


def _require_suffix(request: JobRequest) -> None:
    if request.suffix is not None and not _SUFFIX.fullmatch(request.suffix):
        raise InvalidRequest(f"suffix {request.suffix!r} must be 1 to 64 letters, digits, '_' or '-'.", param="suffix")


def _require_one_held_out(request: JobRequest) -> None:
    if request.validation_file is not None and request.options.evaluation.split > 0:
        raise InvalidRequest(
            "Both validation_file and trl.evaluation.split are given: held-out pairs come from one of them.",
            param="trl.evaluation.split",
        )


def _require_mismatched(request: JobRequest) -> None:
    """KTO's reference point comes from prompts with the completions of other rows of the same batch."""
    if request.method == "kto" and request.options.kto.loss_type == "kto" and request.batch_size == 1:
        raise InvalidRequest(
            'kto needs a batch_size of 2 or more: use that, or trl.kto.loss_type "apo_zero_unpaired".',
            param="method.kto.hyperparameters.batch_size",
        )


def _require_comparable(request: JobRequest) -> None:
    evaluation = request.options.evaluation
    require_known(evaluation, request.method)
    if evaluation.early_stopping is not None and request.validation_file is None and evaluation.split == 0:
        raise InvalidRequest(
            "trl.evaluation.early_stopping needs rows to evaluate on: give a validation_file, or hold out some of the "
            "training rows with trl.evaluation.split.",
            param="trl.evaluation.early_stopping",
        )


def resolve_spec(
    request: JobRequest,
    *,
    job_id: str,
    model_path: Path | None,
    training_file: Path,
    validation_file: Path | None,
    device: Literal["auto", "cuda", "cpu", "mps"],
    reference_cache: Path | None = None,
) -> TrainingSpec:
    """The complete specification of a job: every "auto" of the request replaced by its value."""
    base_rate = LEARNING_RATES[request.method][request.options.tuning]
    multiplier = 1.0 if request.learning_rate_multiplier is None else request.learning_rate_multiplier
    return TrainingSpec(
        job_id=job_id,
        method=request.method,
        model=request.model,
        model_path=None if model_path is None else str(model_path),
        training_file=str(training_file),
        validation_file=None if validation_file is None else str(validation_file),
        reference_cache=None if reference_cache is None else str(reference_cache),
        seed=AUTO_SEED if request.seed is None else request.seed,
        beta=AUTO_BETAS.get(request.method) if request.beta is None else request.beta,
        batch_size=batch_size(AUTO_BATCH_SIZE, request.options.devices)
        if request.batch_size is None
        else request.batch_size,
        n_epochs=AUTO_EPOCHS if request.n_epochs is None else request.n_epochs,
        learning_rate=request.options.optimizer.learning_rate or base_rate * multiplier,
        device=device,
        options=request.options,
    )
