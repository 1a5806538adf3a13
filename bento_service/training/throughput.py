"""What a training step costs: rows, tokens and padding counted on the way through a trainer, time and memory."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bento_service.training.flops import device_flops, flops_per_position
from bento_service.training.shared_batches import FILLER, SharedBatchTrainer
from bento_service.training.spec import TrainingSpec


class BatchSize(NamedTuple):
    """One batch on its way through the model."""

    rows: int  # of the data: pairs, conversations, ...
    tokens: int  # of these rows, padding not counted
    computed: int  # positions that went through the model
    padding: int  # of these


@dataclass
class Totals:
    """Sums over the batches that this process has trained on."""

    rows: int = 0
    tokens: int = 0
    computed: int = 0
    padding: int = 0


class CountingTrainer(SharedBatchTrainer):
    """A base beside one of TRL's trainers (``class X(CountingTrainer, DPOTrainer)``) that counts what it trains on.

    ``state.num_input_tokens_seen``, which a checkpoint keeps, is counted here too: transformers takes every pad token
    for padding where there is no attention mask, also an end token that is used for both.
    """

    sequences_per_row = 1
    totals: Totals

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.totals = Totals()
        super().__init__(*args, **kwargs)

    def further_passes(self) -> int:
        """Forward passes of a batch beside the one that is trained."""
        return 0

    def rows_in(self, inputs: Mapping[str, Any]) -> int:
        return self.batch_size(inputs).rows

    def batch_size(self, inputs: Mapping[str, Any]) -> BatchSize:
        """The size of a batch as the collator made it, padded or, with position ids only, packed into one sequence."""
        positions: int = inputs["input_ids"].numel()
        if "attention_mask" in inputs:
            tokens = int(inputs["attention_mask"].sum())
            rows = len(inputs["input_ids"]) // self.sequences_per_row
        else:
            tokens = positions
            rows = int((inputs["position_ids"] == 0).sum())
        return BatchSize(rows=rows, tokens=tokens, computed=positions, padding=positions - tokens)

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        # Called by the Trainer once for each batch that it trains on.
        nothing = BatchSize(rows=0, tokens=0, computed=0, padding=0)
        counts = nothing if FILLER in inputs else self.batch_size(inputs)
        size = torch.tensor(counts, dtype=torch.int64, device=self.args.device)
        rows, tokens, computed, padding = self.accelerator.gather(size).view(-1, len(size)).sum(0).tolist()
        self.totals.rows += rows
        self.totals.tokens += tokens
        self.totals.computed += computed
        self.totals.padding += padding
        self.state.num_input_tokens_seen += tokens


class Meter:
    """What training costs, between two readings.

    Time is counted from the end of one step to the end of the next, with the loading of data, and without
    evaluations and checkpoints: ``restart`` is called after these.
    """

    def __init__(self, trainer: CountingTrainer, spec: TrainingSpec) -> None:
        self._totals = trainer.totals
        self._flops_per_position = flops_per_position(
            trainer.model, all_trained=spec.options.tuning == "full", further_passes=trainer.further_passes()
        )
        # In float32 a GPU has another peak, with or without TF32.
        device = device_flops(trainer.model) if trainer.args.bf16 or trainer.args.fp16 else None
        self._device_flops = None if device is None else device * trainer.accelerator.num_processes
        self._read = replace(trainer.totals)
        self._seconds = 0.0
        self._since = time.monotonic()

    def restart(self) -> None:
        self._since = time.monotonic()

    def step_ended(self) -> None:
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now

    def read(self) -> dict[str, float]:
        """The steps since the last reading, as values of a metrics event.

        tokens_per_second and rows_per_second do not count padding; padding_fraction is of the positions that went
        through the model; memory_peak_bytes is the process's so far, on a GPU its tensors', else its resident set;
        model_flops_utilization is of the devices' peak, see ``flops``. Of several ranks all rows and tokens count, and
        the memory is that of the one that reads.
        """
        values: dict[str, float] = {"memory_peak_bytes": peak_memory()}
        rows = self._totals.rows - self._read.rows
        tokens = self._totals.tokens - self._read.tokens
        computed = self._totals.computed - self._read.computed
        padding = self._totals.padding - self._read.padding
        if computed > 0:
            values["padding_fraction"] = padding / computed
        if self._seconds > 0:
            values["tokens_per_second"] = tokens / self._seconds
            values["rows_per_second"] = rows / self._seconds
            if self._device_flops is not None:
                done = (computed - padding) * self._flops_per_position
                values["model_flops_utilization"] = done / (self._seconds * self._device_flops)
        self._read = replace(self._totals)
        self._seconds = 0.0
        return values


def peak_memory() -> int:
    """Bytes: the peak of the tensors on the GPU, or of the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # Not from getrusage: there it is also that of the process which this one was forked from.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
