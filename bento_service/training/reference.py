"""The reference model's log-probabilities: whether to compute them before training, and keeping them between jobs."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from bento_service.training.schedule import Schedule
from bento_service.training.spec import TrainingSpec

# Entries kept in a cache folder, 8 bytes a pair each; those not used for the longest are deleted first.
KEPT = 64

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def precompute_pays(spec: TrainingSpec, rows: int) -> bool:
    """Whether to score the data with the reference model once, before training, if the user does not say.

    One pass over ``rows`` pairs costs as much as scoring them step by step in one epoch. In full fine-tuning it spares
    a second model in memory, so it pays from one epoch on; with an adapter, where there is no second model, from two.
    """
    if spec.distribution in ("fsdp", "deepspeed"):
        return False  # before training no device has the whole model
    if spec.options.dpo.precompute_ref_log_probs is not None:
        return spec.options.dpo.precompute_ref_log_probs
    steps = Schedule.of(spec, rows=rows, evaluated=False).total_steps
    scored = steps * spec.batch_size * spec.options.gradient_accumulation_steps
    return scored >= rows if spec.options.tuning == "full" else scored >= 2 * rows


class ReferenceCache:
    """Log-probabilities of whole datasets in a folder, by everything that they depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, dataset: Dataset, key: str) -> Dataset | None:
        """The dataset with its two columns of log-probabilities, or None when they are not known."""
        path = self._path(key)
        try:
            columns = load_file(path)
            os.utime(path)
        except (FileNotFoundError, SafetensorError):  # of a torn file too: it is computed and written anew
            return None
        for name in _COLUMNS:
            dataset = dataset.add_column(name, columns[name])
        return dataset

    def keep(self, dataset: Dataset, key: str) -> None:
        """Store the two columns of a dataset that has them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, NDArray[np.float32]] = {
            name: np.asarray(dataset[name][:], dtype=np.float32) for name in _COLUMNS
        }
        partial = self._folder / f".{uuid4().hex}"
        save_file(columns, partial)
        os.replace(partial, self._path(key))
        by_age = sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-KEPT]:
            old.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def reference_key(model: nn.Module, dataset: Dataset, **settings: Any) -> str:
    """SHA-256 of the reference's weights, the tokenized pairs in their order, and the settings that matter.

    Of a model with an adapter these are the weights without it, so that jobs with other adapters find them too.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, tensor in _base_weights(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy())
    for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for batch in dataset.select_columns([part]).with_format("arrow").iter(batch_size=10_000):
            column = batch.column(part).combine_chunks()
            digest.update(np.asarray(column.value_lengths(), dtype=np.int64))
            digest.update(np.asarray(column.flatten(), dtype=np.int64))
    return digest.hexdigest()


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name:
            yield name.replace(".base_layer", "").removeprefix("base_model.model."), tensor
