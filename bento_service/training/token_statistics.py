"""What the tokens of a data file come to: lengths, rows cut and left out, padding. Nothing is tokenized here."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from bento_service.training.tokenization import RowTokens

COLUMNS = {1: ("prompt", "completion"), 2: ("prompt", "chosen", "rejected")}


class Distribution(BaseModel):
    """Lengths in tokens, of all rows, before anything is cut."""

    model_config = ConfigDict(frozen=True)

    mean: float
    median: int
    p95: int = Field(description="95 of 100 rows have as many or fewer.")
    max: int


class TokenStatistics(BaseModel):
    """Tokens of a set of rows that is trained on. Sums are those of one pass over it."""

    model_config = ConfigDict(frozen=True)

    rows: int
    tokenized_rows: int = Field(
        description="Fewer than `rows` when the time was up: then all other figures are estimates from a sample."
    )
    left_out: int = Field(
        description="Rows that are not trained on: the prompt alone has max_length tokens or more; in reward jobs, a "
        "reply with its prompt has more."
    )
    cut: int = Field(description="Rows of which something is cut at max_length.")
    lengths: dict[str, Distribution] = Field(description="By column.")
    longest: int = Field(description="Tokens of the longest sequence, prompt and reply, after cutting.")
    tokens: int = Field(
        description="Tokens that the model reads, padding not counted: the prompt once for each reply."
    )
    padded_tokens: int = Field(description="The same with the padding of random batches (its expected value).")
    shared_prompt_tokens: int = Field(
        description="Of `tokens`, those that repeat a pair's prompt for its second reply."
    )
    largest_examples: list[tuple[int, int]] = Field(
        description="Tokens of the largest rows with the prompt counted once, and of their replies; one batch of them."
    )

    @property
    def trained(self) -> int:
        """Rows that are trained on."""
        return self.rows - self.left_out


class TokenTally:
    """Adds rows up. ``weight`` is the number of rows that a tokenized one stands for.

    Memory grows with the number of different lengths, not of rows.
    """

    def __init__(self, max_length: int, batch_size: int, *, keeps_end: bool = False, cuts: bool = True) -> None:
        self._max_length = max_length
        self._keeps_end = keeps_end  # of sequences that are cut: then no row is left out
        self._cuts = cuts  # what is too long; else it is left out
        self._batch_size = batch_size
        self._tokenized = 0
        self._rows = 0.0
        self._left_out = 0.0
        self._cut = 0.0
        self._tokens = 0.0
        self._shared = 0.0
        self._lengths: dict[str, Counter[int]] = defaultdict(Counter)
        self._widths: Counter[int] = Counter()  # of the rows' longest sequences
        self._sequences = 1
        self._largest: list[tuple[int, int]] = []

    def add(self, row: RowTokens, weight: float = 1.0) -> None:
        self._tokenized += 1
        self._rows += weight
        self._sequences = len(row.replies)
        for column, length in zip(COLUMNS[len(row.replies)], (row.prompt, *row.replies), strict=True):
            self._lengths[column][length] += weight  # type: ignore[assignment]
        too_long = row.is_dropped(self._max_length) if self._cuts else row.is_cut(self._max_length)
        if too_long and not self._keeps_end:
            self._left_out += weight
            return
        if row.is_cut(self._max_length):
            self._cut += weight
        sequences = row.sequences(self._max_length)
        shared = row.prompt
        if self._keeps_end and row.is_cut(self._max_length):
            shared = 0  # the sequences begin at other tokens of the prompt
        replies = sum(sequences) - len(sequences) * shared
        self._tokens += weight * sum(sequences)
        self._shared += weight * shared * (len(sequences) - 1)
        self._widths[max(sequences)] += weight  # type: ignore[assignment]
        push = heapq.heappush if len(self._largest) < self._batch_size else heapq.heappushpop
        push(self._largest, (shared + replies, min(replies, sum(row.replies))))

    def statistics(self, rows: int) -> TokenStatistics:
        """``rows`` is how many there are, tokenized or not."""
        scale = rows / self._rows if self._rows else 0.0
        padded = padded_tokens(self._widths, self._batch_size, self._sequences)
        return TokenStatistics(
            rows=rows,
            tokenized_rows=self._tokenized,
            left_out=round(self._left_out * scale),
            cut=round(self._cut * scale),
            lengths={column: _distribution(counts) for column, counts in self._lengths.items()},
            longest=max(self._widths, default=0),
            tokens=round(self._tokens * scale),
            padded_tokens=round(padded * scale),
            shared_prompt_tokens=round(self._shared * scale),
            largest_examples=sorted(self._largest, reverse=True),
        )


def padded_tokens(widths: Mapping[int, float], batch_size: int, sequences: int) -> float:
    """Expected tokens of one pass in random batches, each padded to its longest sequence.

    ``widths`` counts rows by their longest sequence; a row has ``sequences`` of them. A batch of b out of n rows is no
    wider than w with the probability C(m, b) / C(n, b), where m rows are no wider.
    """
    rows = sum(widths.values())
    full, rest = divmod(round(rows), batch_size)
    return sequences * (
        full * batch_size * _expected_width(widths, rows, batch_size) + rest * _expected_width(widths, rows, rest)
    )


def _expected_width(widths: Mapping[int, float], rows: float, drawn: int) -> float:
    expected, before, narrower = 0.0, 0.0, 0.0
    for width in sorted(widths):
        narrower += widths[width]
        chance = math.prod(max(0.0, narrower - i) / (rows - i) for i in range(drawn)) if drawn < rows else 0.0
        if narrower >= rows - 1e-6:
            chance = 1.0
        expected += width * (chance - before)
        before = chance
    return expected


def _distribution(counts: Mapping[int, float]) -> Distribution:
    rows = sum(counts.values())
    return Distribution(
        mean=round(sum(length * count for length, count in counts.items()) / rows, 2),
        median=_quantile(counts, 0.5 * rows),
        p95=_quantile(counts, 0.95 * rows),
        max=max(counts),
    )


def _quantile(counts: Mapping[int, float], rank: float) -> int:
    """The smallest length that at least ``rank`` rows do not pass."""
    passed = 0.0
    for length in sorted(counts):
        passed += counts[length]
        if passed >= rank - 1e-6:
            return length
    return max(counts)
