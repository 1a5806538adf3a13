"""Batches shared out among ranks, so that together they compute what one process computes on the whole batch.

transformers and accelerate give each rank batches of its own, and fill up the last ones of an epoch with rows from its
beginning. Here a batch is the one that a single process would have, cut into parts; parts of the last one can differ
in length, and each counts by its rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer

from bento_service.training.rank import of_each

# Marks the batch of a rank for which a short batch has no rows. It goes through the model, so that all ranks make the
# same calls, and counts for nothing.
FILLER = "filler"


class RankBatches(BatchSampler):
    """The part of each of ``batches`` that is this rank's: empty where a batch has fewer rows than there are ranks."""

    def __init__(self, batches: BatchSampler, *, rank: int, ranks: int) -> None:
        self._batches = batches
        self._rank = rank
        self._ranks = ranks
        # What accelerate reads: the sampler, whose epoch it sets, and the size of the whole batches.
        self.sampler = batches.sampler
        self.batch_size = batches.batch_size
        self.split_batches = True

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield part(batch, self._rank, self._ranks)


def part[T](items: Sequence[T], rank: int, ranks: int) -> list[T]:
    """The rank's part of ``items``: parts are contiguous and differ in length by one at most."""
    size, longer = divmod(len(items), ranks)
    start = rank * size + min(rank, longer)
    return list(items[start : start + size + (rank < longer)])


class FillingCollator:
    """A collator that makes of no rows a batch with one, marked as ``FILLER``."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], row: Any) -> None:
        self._collator = collator
        self._row = row

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if rows:
            return self._collator(rows)
        batch = dict(self._collator([self._row]))
        if "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)  # not among the tokens that are counted
        return batch | {FILLER: True}


class SharedBatchTrainer(Trainer):
    """A base beside one of TRL's trainers, whose ranks share each batch.

    ``per_device_train_batch_size`` times the number of ranks is the batch. With one process nothing is different.
    """

    accelerator: Any
    data_collator: Any
    gathers_means = False  # whether TRL gathers means over a rank's rows, to take their mean
    rank_weight: float = 1.0  # of this rank's part of the batch under way in the mean over ranks

    def rows_in(self, inputs: Mapping[str, Any]) -> int:
        """Rows of a collated batch, over which its loss is a mean."""
        raise NotImplementedError

    def loss_items(self, inputs: Mapping[str, Any]) -> int:
        """What the loss of a collated batch is a mean over, counted."""
        return self.rows_in(inputs)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader[Any]:
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        collator = self.data_collator
        self.data_collator = FillingCollator(collator, dataset[0])
        try:
            loader: Any = super()._get_dataloader(dataset, description, batch_size * ranks, *args, **kwargs)
        finally:
            self.data_collator = collator
        # accelerate would give whole batches to one rank after the other, and fill up the last ones.
        whole = loader.batch_sampler.batch_sampler
        shared = RankBatches(whole, rank=self.accelerator.process_index, ranks=ranks)
        # A DataLoader takes another sampler only when it is made, and this one is made by accelerate.
        object.__setattr__(loader.base_dataloader, "batch_sampler", shared)
        return loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of this rank's part, weighted so that the mean over ranks is the batch's; evaluated, that mean."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        filler = inputs.pop(FILLER, False)
        here = self.rows_in(inputs)
        rows = of_each(0 if filler else here)
        if num_items_in_batch is not None:  # the loss is a sum over the whole batch's tokens already
            self.rank_weight = 1.0
        else:
            items = of_each(0 if filler else self.loss_items(inputs))
            self.rank_weight = len(items) * items[accelerator.process_index] / max(1, sum(items))
        self.accelerator = PartsGathered(accelerator, rows, here=here, means=self.gathers_means)
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.accelerator = accelerator
        loss, outputs = result if return_outputs else (result, None)
        loss = loss * self.rank_weight
        if not torch.is_grad_enabled():
            loss = accelerator.reduce(loss, reduction="mean")
        return (loss, outputs) if return_outputs else loss


class PartsGathered:
    """An Accelerator whose ``gather`` makes whole batches of ranks' parts that differ in length.

    ``rows`` are those of each rank, ``here`` those of the batch that this one has, counted or not. With ``means``,
    single numbers are means over a rank's rows. Where gather_for_metrics would cut off what accelerate filled up,
    nothing is.
    """

    def __init__(self, accelerator: Any, rows: Sequence[int], *, here: int, means: bool = False) -> None:
        self._accelerator = accelerator
        self._rows = rows
        self._here = here
        self._means = means

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        """A value of each rank that has rows (a mean as often as there are), or those of each row of all ranks."""
        rows = torch.tensor(self._rows, device=tensor.device)
        if tensor.dim() == 0:
            values = self._accelerator.gather(tensor)
            return values.repeat_interleave(rows) if self._means and tensor.is_floating_point() else values[rows > 0]
        each = len(tensor) // self._here  # a reward model has two values of a pair
        padded = tensor.new_zeros(each * max(self._rows), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = self._accelerator.gather(padded).view(len(self._rows), *padded.shape)
        return torch.cat([part[: each * rows] for part, rows in zip(parts, self._rows, strict=True)])

    gather_for_metrics = gather
