"""Batches cut into parts: the parts together are the batch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from bento_service.training.shared_batches import FILLER, FillingCollator, PartsGathered, RankBatches, part


@given(st.lists(st.integers(), max_size=20), st.integers(min_value=1, max_value=7))
def test_parts_are_the_whole_in_order_and_differ_by_one_row_at_most(items, ranks):
    parts = [part(items, rank, ranks) for rank in range(ranks)]
    assert list(itertools.chain(*parts)) == items
    lengths = [len(each) for each in parts]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


def test_all_ranks_have_as_many_batches_as_one_process():
    def batches():
        return BatchSampler(SequentialSampler(range(9)), batch_size=4, drop_last=False)

    first, second = (RankBatches(batches(), rank=rank, ranks=2) for rank in range(2))
    assert list(first) == [[0, 1], [4, 5], [8]]
    assert list(second) == [[2, 3], [6, 7], []]
    assert len(first) == len(second) == 3


def test_no_rows_become_a_batch_that_counts_for_nothing():
    collate = FillingCollator(lambda rows: {"labels": torch.tensor(rows)}, row=[5, 6])
    assert FILLER not in collate([[1, 2]])
    filler = collate([])
    assert filler[FILLER] and filler["labels"].tolist() == [[-100, -100]]


class Together:
    """An Accelerator of two ranks, of which this is the first; the other one's tensor is given."""

    process_index = 0

    def __init__(self, other):
        self.other = other

    def gather(self, tensor):
        return torch.stack([tensor, self.other.squeeze()]) if tensor.dim() == 0 else torch.cat([tensor, self.other])


def test_a_number_of_each_rank_is_a_sum_or_the_mean_of_its_rows():
    def gathered(number, *, means):
        accelerator = PartsGathered(Together(torch.tensor(2 * number)), [2, 1], here=2, means=means)
        return accelerator.gather_for_metrics(torch.tensor(number))

    assert gathered(4.0, means=False).sum().item() == 12
    assert gathered(4.0, means=True).mean().item() == pytest.approx((2 * 4 + 8) / 3)
    assert gathered(4, means=True).sum().item() == 12  # a count


def test_values_of_rows_are_gathered_without_what_fills_up():
    accelerator = PartsGathered(Together(torch.tensor([3.0, 0.0])), [2, 1], here=2, means=False)
    assert accelerator.gather(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0, 3.0]
    accelerator = PartsGathered(Together(torch.tensor([9.0])), [1, 0], here=1, means=False)
    assert accelerator.gather(torch.tensor([1.0])).tolist() == [1.0]
    assert accelerator.gather(torch.tensor(1.0)).tolist() == [1.0]
