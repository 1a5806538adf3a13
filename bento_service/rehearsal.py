"""A request gone through without making a job of it: what would be refused, what it would train, what that takes."""

import threading
from dataclasses import dataclass
from pathlib import Path

from bento_service.admission import Admission
from bento_service.distribution import memory_of_each, precision
from bento_service.jobs.devices import Devices
from bento_service.jobs.disk import DiskNeed, disk_need
from bento_service.jobs.job import JobRequest
from bento_service.preview_process import PreviewProcesses
from bento_service.settings import Settings
from bento_service.training.memory import (
    ComputePrecision,
    MemoryEstimate,
    MicroBatch,
    estimate,
    packed_batch,
    padded_batch,
)
from bento_service.training.model_shape import ModelShape
from bento_service.training.preview import Order, Preview, Refusal, refusal_of
from bento_service.training.row_budget import row_tokens
from bento_service.training.spec import TrainingSpec
from bento_service.training.token_statistics import TokenStatistics

_JOB_ID = "ftjob-validated"


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What one device needs, and what it has (None: that cannot be told)."""

    estimate: MemoryEstimate
    precision: ComputePrecision
    capacity: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.estimate.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """``refusals`` is all that keeps the request from becoming a job that trains.

    ``spec`` and what follows from it are None when the model or a file is not there; ``preview.tokens`` is None when
    the rows cannot be trained on; ``memory`` when the model is not on this host.
    """

    refusals: tuple[Refusal, ...]
    spec: TrainingSpec | None
    preview: Preview | None
    memory: MemoryNeed | None
    disk: DiskNeed | None

    @property
    def valid(self) -> bool:
        return not self.refusals


class Rehearsals:
    """Goes through requests as the host of ``admission`` would."""

    def __init__(self, settings: Settings, devices: Devices, admission: Admission) -> None:
        self._settings = settings
        self._devices = devices
        self._admission = admission
        self._processes = PreviewProcesses(settings)

    def rehearse(self, request: JobRequest, cancelled: threading.Event) -> Rehearsal:
        """Blocks while the data is read. Raises Overloaded (see ``PreviewProcesses.run``)."""
        verdict = self._admission.judge(request, _JOB_ID)
        refusals = [refusal_of(error) for error in verdict.refusals]
        spec = verdict.spec
        if spec is None or any(refusal.param in ("method.type", "model") for refusal in refusals):
            return Rehearsal(refusals=tuple(refusals), spec=spec, preview=None, memory=None, disk=None)
        trusted = spec.model in self._settings.trust_remote_code_models
        order = Order(
            spec=spec.model_copy(update={"trust_remote_code": trusted}),
            bounds=self._settings.row_bounds,
            cap=self._settings.max_report_rows,
            seconds=self._settings.validate_seconds,
        )
        preview = self._processes.run(order, cancelled)
        return Rehearsal(
            refusals=(*refusals, *preview.refusals),
            spec=spec,
            preview=preview,
            memory=self._memory(spec, preview.tokens),
            disk=disk_need(spec, self._settings.runs_path),
        )

    def _memory(self, spec: TrainingSpec, tokens: TokenStatistics | None) -> MemoryNeed | None:
        if spec.model_path is None:
            return None
        shape, capacity = ModelShape.of(Path(spec.model_path)), memory_of_each(spec, self._devices)
        computed = precision(spec, self._devices)
        row = row_tokens(spec, shape, self._devices.kind, computed, free=capacity)
        batch = None if tokens is None else largest_batch(spec, tokens, row)
        found = estimate(spec, shape, computed, self._devices.kind, batch)
        return MemoryNeed(estimate=found, precision=computed, capacity=capacity)


def largest_batch(spec: TrainingSpec, tokens: TokenStatistics, row: int) -> MicroBatch:
    """The largest batch that a device can meet: one with the longest sequence in it, padded to that.

    Packed DPO has rows of ``row`` tokens; for a model that cannot be packed, which shows when it is loaded, the answer
    is too small.
    """
    size = spec.batch_size // spec.ranks
    if spec.method == "dpo" and spec.options.dpo.packing and tokens.largest_examples:
        return packed_batch(tokens.largest_examples[:size], row)
    if spec.method == "supervised" and spec.options.sft.packing:
        return padded_batch(spec.options.max_length, sequences=1, size=size)
    return padded_batch(
        tokens.longest,
        sequences=2 if spec.method in ("dpo", "reward") else 1,
        size=size,
        generates=spec.method != "reward",
    )
