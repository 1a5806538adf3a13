"""Which way a dataset takes to the service, told from what it is registered as."""

from pathlib import Path
from typing import Any

import pytest
from llama_stack_provider_trl_remote.errors import NotFound, RequestRefused
from llama_stack_provider_trl_remote.sources import (
    Inline,
    LocalFile,
    Remote,
    Rows,
    ServiceFile,
    Source,
    Table,
    source_of,
)

from tests.unit.adapter.stack_fakes import PAIRS, dataset


def of(uri: str, *, tables: bool = True, folders: list[str] | None = None) -> Source:
    registered = dataset("d", {"type": "uri", "uri": uri})
    return source_of("d", registered, tables=tables, folders=folders)


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("/data/a.jsonl", LocalFile(Path("/data/a.jsonl"))),
        ("file:///data/a.parquet", LocalFile(Path("/data/a.parquet"))),
        ("file://localhost/data/a.csv.gz", LocalFile(Path("/data/a.csv.gz"))),
        # '#' and '?' are part of a file's name, %20 of a URI's.
        ("/data/a#1?.jsonl", LocalFile(Path("/data/a#1?.jsonl"))),
        ("file:///data/a%20b.JSON", LocalFile(Path("/data/a b.JSON"))),
        ("/data/a.xlsx", Table("/data/a.xlsx", importable=False)),
        ("http://host/a.csv?x=1", Table("http://host/a.csv?x=1", importable=True)),
        ("https://host/a.jsonl", Remote("https://host/a.jsonl")),
        ("huggingface://datasets/a/b", Table("huggingface://datasets/a/b", importable=True)),
        ("data:text/csv;base64,YSxi", Inline(b"a,b")),
        ("data:application/json,[%7B%7D]", Inline(b"[{}]")),
    ],
)
def test_uris(uri: str, source: Source) -> None:
    assert of(uri) == source


@pytest.mark.parametrize(
    "uri",
    ["lsfs://a.jsonl", "file://elsewhere/a.jsonl", "/etc/passwd", "ftp://host/a.csv", "data:x", "data:;base64,?"],
)
def test_uris_that_nobody_reads(uri: str) -> None:
    with pytest.raises(RequestRefused, match="'d'"):
        of(uri)


def test_without_datasetio_the_service_is_asked() -> None:
    assert of("http://host/a.csv", tables=False) == Remote("http://host/a.csv")
    with pytest.raises(RequestRefused, match="What works"):
        of("/data/a.xlsx", tables=False)


def test_files_outside_the_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    inside = str(tmp_path / "in" / "a.jsonl")
    assert of(inside, folders=[str(tmp_path / "in")]) == LocalFile(Path(inside))
    for outside in (f"{tmp_path}/secret.jsonl", f"{tmp_path}/in/../secret.jsonl", f"{tmp_path}/in/link.jsonl"):
        with pytest.raises(RequestRefused, match="local_folders"):
            of(outside, folders=[str(tmp_path / "in")])
    with pytest.raises(RequestRefused, match="there are none"):
        of(inside, folders=[])


def test_rows_and_unregistered_ids() -> None:
    def source(dataset_id: str, registered: Any = None) -> Source:
        return source_of(dataset_id, registered, tables=True, folders=None)

    assert source("d", dataset("d", {"type": "rows", "rows": PAIRS})) == Rows(PAIRS)
    assert source("file-0123abc") == ServiceFile("file-0123abc")
    assert source("https://host/a.csv") == Remote("https://host/a.csv")
    with pytest.raises(NotFound, match="'nobody' is not registered"):
        source("nobody")
