"""What a training step costs: counting rows, tokens and padding on the way through a trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import Trainer


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
    computed: int = 0
    padding: int = 0


class CountingTrainer(Trainer):
    """A base beside one of TRL's trainers (``class X(CountingTrainer, DPOTrainer)``) that counts what it trains on.

    ``state.num_input_tokens_seen``, which a checkpoint keeps, is counted here too: transformers takes every pad token
    for padding where there is no attention mask, also an end token that is used for both.
    """

    sequences_per_row = 1
    totals: Totals

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.totals = Totals()
        super().__init__(*args, **kwargs)

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
        size = torch.tensor(self.batch_size(inputs), dtype=torch.int64, device=self.args.device)
        rows, tokens, computed, padding = self.accelerator.gather(size).view(-1, len(size)).sum(0).tolist()
        self.totals.rows += rows
        self.totals.computed += computed
        self.totals.padding += padding
        self.state.num_input_tokens_seen += tokens
