"""Sums and quantiles of token counts, and the padding that random batches are expected to have."""

import itertools
import statistics
from collections import Counter

import pytest

from bento_service.training.token_statistics import TokenTally, padded_tokens
from bento_service.training.tokenization import RowTokens


def tally(rows, *, max_length=100, batch_size=2, **how):
    found = TokenTally(max_length, batch_size, **how)
    for row in rows:
        found.add(row)
    return found.statistics(len(rows))


def test_rows_are_cut_and_left_out_at_max_length():
    found = tally([RowTokens(10, (5, 20)), RowTokens(90, (10, 11)), RowTokens(99, (1, 1)), RowTokens(100, (1, 1))])
    assert (found.rows, found.trained, found.left_out, found.cut) == (4, 3, 1, 1)
    assert found.tokens == (15 + 30) + (100 + 100) + (100 + 100)
    assert found.shared_prompt_tokens == 10 + 90 + 99
    assert found.longest == 100
    # The largest two with the prompt once: 99 + 1 + 1 and 90 + 10 + 10, the longer reply being cut.
    assert found.largest_examples == [(110, 20), (101, 2)]


def test_what_keeps_its_end_is_never_left_out_and_shares_no_prompt_once_cut():
    found = tally([RowTokens(10, (5, 20)), RowTokens(100, (30, 1))], keeps_end=True)
    assert (found.trained, found.left_out, found.cut) == (2, 0, 1)
    assert found.tokens == (15 + 30) + (100 + 100)
    assert found.shared_prompt_tokens == 10
    assert found.largest_examples == [(200, 31), (35, 25)]


def test_what_is_not_cut_is_left_out_when_it_is_too_long():
    found = tally([RowTokens(10, (5, 90)), RowTokens(10, (5, 91)), RowTokens(100, (1, 1))], cuts=False)
    assert (found.trained, found.left_out, found.cut) == (1, 2, 0)
    assert (found.tokens, found.longest) == (15 + 100, 100)


def test_lengths_by_column():
    found = tally([RowTokens(n, (2 * n, 1)) for n in range(1, 101)], max_length=1000)
    prompt = found.lengths["prompt"]
    assert (prompt.mean, prompt.median, prompt.p95, prompt.max) == (50.5, 50, 95, 100)
    assert (found.lengths["chosen"].median, found.lengths["rejected"].max) == (100, 1)
    assert set(tally([RowTokens(3, (4,))]).lengths) == {"prompt", "completion"}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_padding_is_the_mean_over_all_orders(batch_size):
    widths = [3, 5, 5, 8, 12]
    orders = [
        2 * sum(len(batch) * max(batch) for batch in itertools.batched(order, batch_size))
        for order in itertools.permutations(widths)
    ]
    assert padded_tokens(Counter(widths), batch_size, 2) == pytest.approx(statistics.mean(orders))


def test_a_sample_stands_for_all_rows():
    found = TokenTally(100, 2)
    for length in (10, 20):
        found.add(RowTokens(length, (10, 10)), weight=50)
    estimated = found.statistics(200)
    assert (estimated.rows, estimated.tokenized_rows) == (200, 2)
    assert estimated.tokens == 100 * 2 * 20 + 100 * 2 * 30
    assert estimated.padded_tokens == pytest.approx(200 * 2 * 27.5, rel=0.01)
