"""Dataset rows on their way to the service."""

import asyncio
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_stack_provider_trl_remote.errors import RequestRefused
from llama_stack_provider_trl_remote.rows import cleaned, spooled
from llama_stack_provider_trl_remote.sources import Inline, LocalFile, Rows, Source, Table

from tests.unit.adapter.stack_fakes import PAIRS, FakeDatasets

TABLE = Table("pairs.csv", importable=False)


def spool(stack: FakeDatasets, page_rows: int = 2, source: Any = TABLE) -> tuple[bytes, str]:
    """Through datasetio, as a table."""

    async def read() -> tuple[bytes, str]:
        async with spooled("pairs", source, stack, page_rows) as data:
            data.file.seek(0)
            return data.file.read(), data.sha256

    return asyncio.run(read())


def test_rows_are_read_in_bounded_pages_and_all_arrive_in_order() -> None:
    stack = FakeDatasets(pairs=PAIRS)
    content, _ = spool(stack)
    assert stack.limits == [2, 2, 2]
    assert content.decode().splitlines()[4] == '{"chosen":"good 4","prompt":"p4","rejected":"bad 4"}'


def test_the_same_rows_give_the_same_bytes_whatever_the_page() -> None:
    reordered = [dict(reversed(row.items())) for row in PAIRS]
    results = {spool(FakeDatasets(pairs=PAIRS), n) for n in (1, 2, 5, 100)} | {spool(FakeDatasets(pairs=reordered))}
    assert len(results) == 1


def test_what_pandas_did_is_undone() -> None:
    rows: list[dict[str, Any]] = [
        {"chosen": "a", "rejected": "b", "rank": 3, "messages": [{"content": "x", "n": 1.0}]},
        {"chosen": "ü", "rejected": "d", "score": 0.5},
    ]
    content, _ = spool(FakeDatasets(pairs=rows))
    assert content.decode().splitlines() == [
        '{"chosen":"a","messages":[{"content":"x","n":1.0}],"rank":3,"rejected":"b"}',
        '{"chosen":"ü","rejected":"d","score":0.5}',
    ]


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=3), st.integers(-(2**53), 2**53) | st.text() | st.booleans()))
def test_integers_survive_being_floats(row: dict[str, Any]) -> None:
    through = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in row.items()}
    restored = cleaned({**through, "absent": math.nan})
    assert restored == row
    assert all(type(restored[key]) is type(row[key]) for key in row)


@pytest.mark.parametrize("value", [[math.nan], math.inf, object(), ["\ud800"]])
def test_a_value_that_json_cannot_hold_is_named(value: object) -> None:
    stack = FakeDatasets(pairs=[*PAIRS, {"chosen": value}])
    with pytest.raises(RequestRefused, match="'pairs', row 6"):
        spool(stack)


def test_a_dataset_provider_that_fails_is_a_refusal_with_its_reason() -> None:
    class Broken(FakeDatasets):
        async def iterrows(self, request: Any) -> Any:
            raise FileNotFoundError("no such file: x.csv")

    with pytest.raises(RequestRefused, match=r"'pairs' cannot be read .*x\.csv"):
        spool(Broken(pairs=PAIRS))


def test_pages_without_rows_do_not_go_on_for_ever() -> None:
    class Endless(FakeDatasets):
        async def iterrows(self, request: Any) -> Any:
            page = await super().iterrows(request)
            page.data, page.has_more = [], True
            return page

    with pytest.raises(RequestRefused, match="no rows from row 0"):
        spool(Endless(pairs=PAIRS))


def test_a_registered_dataset_s_own_rows_are_sent_as_they_are() -> None:
    rows = [{"chosen": "a", "rank": 3, "nothing": None}, {"chosen": "ü", "score": 2.0}]
    content, _ = spool(FakeDatasets(), source=Rows(rows))
    assert content.decode().splitlines() == ['{"chosen":"a","nothing":null,"rank":3}', '{"chosen":"ü","score":2.0}']


def test_a_local_file_is_sent_byte_by_byte(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv.gz"
    file.write_bytes(b"\x1f\x8b anything")
    content, digest = spool(FakeDatasets(), source=LocalFile(file))
    assert content == b"\x1f\x8b anything"
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("source", [Rows([]), Inline(b"")])
def test_nothing_is_an_empty_dataset(source: Source) -> None:
    with pytest.raises(RequestRefused, match="'pairs' is empty"):
        spool(FakeDatasets(), source=source)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.jsonl")
    with pytest.raises(RequestRefused, match="no file"):
        spool(FakeDatasets(), source=LocalFile(tmp_path / "pairs.jsonl"))
