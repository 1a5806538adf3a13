"""How much disk a job will need, estimated from the base model's files, and whether it is there."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from bento_service.training.memory import MOMENTS
from bento_service.training.model_shape import ModelShape
from bento_service.training.spec import TrainingSpec

# Bytes a parameter takes in a checkpoint beside the optimizer's moments: its value, fp32.
_WEIGHT_BYTES = 4

# Events, log and the files beside the weights.
_REST_BYTES = 64 * 2**20


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

    One checkpoint more than ``total_limit`` counts, since the newest is written before the oldest is deleted, and one
    more of a run that is evaluated, since the best is kept. Of
    a model that is not on this host yet nothing is known, and only the small files count. Raises InvalidRequest when
    the model's files are not what their names say.
    """
    trained = 0
    if spec.model_path is not None:
        trained = ModelShape.of(Path(spec.model_path)).trained_parameters(spec.options)
    # With FSDP the weights are saved twice: to be handed out, and to continue from.
    copies = 2 if spec.distribution == "fsdp" else 1
    checkpoint = trained * (copies * _WEIGHT_BYTES + MOMENTS[spec.options.optimizer.name])
    place = next(folder for folder in (runs, *runs.parents) if folder.exists())
    return DiskNeed(
        needed=checkpoint * (spec.options.saving.total_limit + 1 + spec.is_evaluated) + _REST_BYTES,
        free=shutil.disk_usage(place).free,
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
