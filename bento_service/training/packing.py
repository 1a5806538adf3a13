"""Packed batches: preference pairs as trees in one row, so that nothing is computed twice and nothing is padding.

TRL scores a pair as two sequences, prompt + chosen and prompt + rejected. Here a pair is one tree: what both
sequences begin with (the prompt, and whatever both replies begin with) once, then the rest of the chosen sequence,
then the rest of the rejected one. Each token keeps the position it has in its own sequence. A row is several trees one
after the other; ``packed_attention`` lets each token see its own sequence only, so hidden states are those of TRL's
padded batch. The idea of sharing the prompt is that of arXiv:2410.20305.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference


class Tree(NamedTuple):
    """Lengths, in tokens, of the three parts of a pair in a row, in this order."""

    shared: int  # first tokens of both sequences
    chosen: int  # the rest of prompt + chosen
    rejected: int  # the rest of prompt + rejected

    @property
    def tokens(self) -> int:
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """T tokens of several pairs, and how their N predictions are laid out in TRL's padded form."""

    pairs: list[int]  # indices of the pairs in the batch
    trees: list[Tree]  # of these pairs, in the order of the row; last of all the padding of the row, if it has any
    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    sources: Tensor  # [N] positions in the row whose hidden state predicts a token of a reply
    targets: Tensor  # [1, N] the tokens predicted
    scored: Tensor  # [M] for each reply token of the padded form, which of the N predictions it has; M >= N
    padded: Tensor  # [M] where that token is in the padded form [2 * len(pairs), S - 1], flattened
    shape: tuple[int, int]  # (2 * len(pairs), S - 1)
    block_masks: dict[torch.device, Any] = field(default_factory=dict)  # kept here by ``packed_attention``

    @property
    def tokens(self) -> int:
        """T, the tokens that are computed."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedRow":
        return _moved(self, device, non_blocking)

    def unpack(self, values: Tensor | None) -> Tensor | None:
        """Values of the predictions [1, N] in TRL's form [2 * pairs, S - 1], zero where there is no reply token."""
        if values is None:
            return None
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.padded,), values[0, self.scored]).view(self.shape)


@dataclass(frozen=True)
class PackedBatch:
    """The rows of a batch; each pair is in exactly one of them.

    ``repeats`` is how often a row is computed again for nothing, so that all ranks make as many passes.
    """

    rows: list[PackedRow]
    repeats: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Moved to a device; accelerate calls this as it does for tensors."""
        return PackedBatch([row.to(device, non_blocking) for row in self.rows], self.repeats)

    @property
    def passes(self) -> list[tuple[PackedRow, bool]]:
        """The rows to compute, one after the other, and whether each counts; the last one does."""
        return [(self.rows[0], False)] * self.repeats + [(row, True) for row in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return sum(row.tokens for row in self.rows)

    @property
    def padding(self) -> int:
        """Tokens that fill rows up."""
        return sum(tree.tokens for row in self.rows for tree in row.trees[len(row.pairs) :])


@dataclass
class PackedCollator(DataCollatorForPreference):
    """TRL's collator, and the same batch in packed form under the key "packed".

    TRL's padded tensors [2 * pairs, S] stay: its losses and metrics read their masks, and they are small.
    """

    max_tokens: int = 4096  # of a row; a longer pair has a row of its own
    multiple_of: int = 1  # rows are filled up to a multiple of this many tokens, for kernels compiled by shape

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["packed"] = pack(
            batch["input_ids"],
            batch["attention_mask"],
            batch["completion_mask"],
            max_tokens=self.max_tokens,
            multiple_of=self.multiple_of,
            pad_token_id=self.pad_token_id,
        )
        return batch


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    max_tokens: int,
    multiple_of: int = 1,
    pad_token_id: int = 0,
) -> PackedBatch:
    """Pack a batch as TRL's collator makes it: [2 * pairs, S], first all chosen, then all rejected sequences."""
    pairs = input_ids.shape[0] // 2
    lengths = attention_mask.sum(dim=1).tolist()
    trees = []
    for pair in range(pairs):
        # Where replies begin differs between the two sequences if truncation took more of one prompt.
        shorter = min(lengths[pair], lengths[pairs + pair])
        same = (input_ids[pair] == input_ids[pairs + pair]) & (completion_mask[pair] == completion_mask[pairs + pair])
        shared = int(same[:shorter].int().cumprod(dim=0).sum())
        trees.append(Tree(shared, lengths[pair] - shared, lengths[pairs + pair] - shared))
    return PackedBatch(
        [
            _row(row, [trees[pair] for pair in row], input_ids, completion_mask, multiple_of, pad_token_id)
            for row in _rows([tree.tokens for tree in trees], max_tokens)
        ]
    )


def select_pairs(inputs: dict[str, Any], row: PackedRow) -> dict[str, Any]:
    """The part of a collated batch that one of its rows holds, as a batch of its own."""
    pairs = torch.tensor(row.pairs, device=inputs["input_ids"].device)
    both = torch.cat([pairs, pairs + inputs["input_ids"].shape[0] // 2])
    part = {key: inputs[key][both] for key in ("input_ids", "attention_mask", "completion_mask")}
    part |= {key: inputs[key][pairs] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in inputs}
    return part | {"packed": PackedBatch([replace(row, pairs=list(range(len(row.pairs))))])}


def _rows(tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the pairs of each row: first fit, longest pair first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for pair in sorted(range(len(tokens)), key=lambda pair: -tokens[pair]):
        number = next((number for number, free in enumerate(room) if tokens[pair] <= free), len(rows))
        if number == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[number].append(pair)
        room[number] -= tokens[pair]
    return [sorted(row) for row in rows]


def _row(
    pairs: list[int],
    trees: list[Tree],
    input_ids: Tensor,
    completion_mask: Tensor,
    multiple_of: int,
    pad_token_id: int,
) -> PackedRow:
    half, width = input_ids.shape[0] // 2, input_ids.shape[1] - 1
    ids, positions, sources, targets, scored, padded = [], [], [], [], [], []
    start, predictions = 0, 0
    for number, (pair, (shared, chosen, rejected)) in enumerate(zip(pairs, trees, strict=True)):
        first, second = input_ids[pair], input_ids[half + pair]
        ids += [first[: shared + chosen], second[shared : shared + rejected]]
        positions += [torch.arange(shared + chosen), torch.arange(shared, shared + rejected)]

        # In the padded form, column t (of S - 1) holds the prediction of token t + 1 of its sequence.
        of_chosen = completion_mask[pair, 1 : shared + chosen].nonzero()[:, 0]
        of_rejected = completion_mask[half + pair, 1 : shared + rejected].nonzero()[:, 0]
        # A token of the rejected sequence that is shared has the chosen sequence's prediction.
        common = int((of_rejected < shared - 1).sum())
        own = of_rejected[common:]
        sources += [start + of_chosen, start + own + torch.where(own >= shared, chosen, 0)]
        targets += [first[of_chosen + 1], second[own + 1]]
        scored += [
            predictions + torch.arange(len(of_chosen)),
            predictions + torch.arange(common),
            predictions + len(of_chosen) + torch.arange(len(own)),
        ]
        padded += [number * width + of_chosen, (len(pairs) + number) * width + of_rejected]
        start += shared + chosen + rejected
        predictions += len(of_chosen) + len(own)
    if filling := -start % multiple_of:
        ids.append(torch.full((filling,), pad_token_id))
        positions.append(torch.arange(filling))
        trees = [*trees, Tree(filling, 0, 0)]
    return PackedRow(
        pairs=pairs,
        trees=trees,
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        sources=torch.cat(sources),
        targets=torch.cat(targets)[None],
        scored=torch.cat(scored),
        padded=torch.cat(padded),
        shape=(2 * len(pairs), width),
    )


def _moved(row: PackedRow, device: torch.device | str, non_blocking: bool) -> PackedRow:
    tensors = {name: value for name, value in vars(row).items() if isinstance(value, Tensor)}
    return replace(row, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})
