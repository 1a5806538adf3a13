"""How much disk a job will need, estimated from the base model's files, and whether it is there."""

import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from bento_service.errors import InvalidRequest
from bento_service.training.spec import TrainingSpec

# Bytes a parameter takes in a checkpoint: its value and AdamW's two moments, each fp32; SGD here has no moments.
_WEIGHT_BYTES = 4
_MOMENT_BYTES = {"adamw": 8, "adam": 8, "sgd": 0}

# Events, log and the files beside the weights.
_REST_BYTES = 64 * 2**20

# The safetensors format's own limit.
_MAX_HEADER_BYTES = 100_000_000

# Not adapted by LoRA's "all-linear".
_NOT_LINEAR = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True)
class DiskNeed:
    """Bytes wanted and bytes free on the disk of the run directories."""

    needed: int
    free: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def describe(self) -> str:
        return f"needs about {gigabytes(self.needed)} of disk and {gigabytes(self.free)} are free"


def disk_need(spec: TrainingSpec, runs: Path) -> DiskNeed:
    """Compare a job's checkpoints with the free space where they will lie.

    One checkpoint more than ``total_limit`` counts, since the newest is written before the oldest is deleted. Of
    a model that is not on this host yet nothing is known, and only the small files count.
    """
    checkpoint = trained_parameters(spec) * (_WEIGHT_BYTES + _MOMENT_BYTES[spec.options.optimizer.name])
    place = next(folder for folder in (runs, *runs.parents) if folder.exists())
    return DiskNeed(
        needed=checkpoint * (spec.options.saving.total_limit + 1) + _REST_BYTES,
        free=shutil.disk_usage(place).free,
    )


def trained_parameters(spec: TrainingSpec) -> int:
    """Number of trained parameters; 0 when the model's weights are not in a local folder."""
    shapes = _tensor_shapes(Path(spec.model_path)) if spec.model_path is not None else {}
    if spec.options.tuning == "full":
        return sum(math.prod(shape) for shape in shapes.values())
    lora = spec.options.lora
    targets = lora.target_modules
    return sum(
        lora.rank * sum(shape)
        for name, shape in shapes.items()
        if len(shape) == 2
        and (
            not any(part in name for part in _NOT_LINEAR)
            if targets == "all-linear"
            else name.split(".")[-2] in targets
        )
    )


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes from the headers of the safetensors files: 8 bytes of length, then JSON.

    Raises InvalidRequest for a file of another kind, such as a pointer of git LFS.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as weights:
                (length,) = struct.unpack("<Q", weights.read(8))
                header = json.loads(weights.read(min(length, _MAX_HEADER_BYTES)))
            shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"{file} is not a safetensors file ({error}): was the model downloaded completely (git lfs pull)?",
                param="model",
            ) from error
    return shapes


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
