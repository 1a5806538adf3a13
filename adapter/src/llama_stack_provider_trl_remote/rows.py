"""A dataset's content as one file to upload, made in memory that holds one page of rows."""

import asyncio
import hashlib
import json
import math
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import compat
from .errors import AdapterError, RequestRefused
from .sources import Inline, LocalFile, Rows, Table

CHUNK = 1 << 20  # bytes hashed at once


@dataclass(frozen=True)
class DatasetFile:
    """``file`` is open for reading and vanishes with the context that made it."""

    name: str  # for the service's list of files
    file: BinaryIO
    sha256: str  # of the file's bytes


@asynccontextmanager
async def spooled(
    dataset_id: str, source: Rows | LocalFile | Inline | Table, datasetio: Any, page_rows: int
) -> AsyncIterator[DatasetFile]:
    """The dataset's content as a file. The same rows give the same bytes.

    Raises RequestRefused for a dataset that is empty, that cannot be read, or that holds a value JSON cannot.
    """
    if isinstance(source, LocalFile):
        with _opened(dataset_id, source.path) as local:
            sha256 = await asyncio.to_thread(_sha256, dataset_id, local)
            yield DatasetFile(source.path.name, local, sha256)
        return
    with tempfile.TemporaryFile(prefix="trl-remote-") as file:
        name = f"{dataset_id}.jsonl"
        match source:
            case Inline():
                file.write(source.content)
                name = "inline-data"
            case Rows():
                await asyncio.to_thread(_append, dataset_id, file, source.rows, 0)
            case Table():
                start, more = 0, True
                while more:
                    page, more = await _read(datasetio, dataset_id, start, page_rows)
                    if more and not page:
                        raise RequestRefused(
                            f"Dataset '{dataset_id}': datasetio gave no rows from row {start} on, and says it has more"
                        )
                    await asyncio.to_thread(_append, dataset_id, file, map(cleaned, page), start)
                    start += len(page)
        yield DatasetFile(name, file, await asyncio.to_thread(_sha256, dataset_id, file))


def _opened(dataset_id: str, path: Path) -> BinaryIO:
    try:
        # Only a regular file: opening a pipe or a device could wait for ever.
        if not path.is_file():
            raise RequestRefused(f"Dataset '{dataset_id}': there is no file {path} on the stack's host")
        return path.open("rb")
    except OSError as error:
        raise RequestRefused(
            f"Dataset '{dataset_id}': {path} cannot be read on the stack's host: {error.strerror}"
        ) from error


def _sha256(dataset_id: str, file: BinaryIO) -> str:
    """Of the whole file. Raises RequestRefused for an empty one."""
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    if not size:
        raise RequestRefused(f"Dataset '{dataset_id}' is empty: register it with at least one row")
    return digest.hexdigest()


def _append(dataset_id: str, file: BinaryIO, rows: Iterable[dict[str, Any]], start: int) -> None:
    for number, row in enumerate(rows, start + 1):
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
            file.write(text.encode() + b"\n")
        except (TypeError, ValueError) as error:  # ValueError: infinity, or a lone surrogate
            raise RequestRefused(f"Dataset '{dataset_id}', row {number} cannot be written as JSON: {error}") from error


def cleaned(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it was before pandas had it: keys that were absent gone, integers integers again.

    A frame has every column in every row, NaN where the row had no such key, and such a column of integers has
    become one of floats. Only columns are touched; what is nested inside a value passes through pandas unchanged.
    """
    return {key: _restored(value) for key, value in row.items() if not _is_nan(value)}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _restored(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


async def _read(datasetio: Any, dataset_id: str, start: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
    try:
        return await compat.read_rows(datasetio, dataset_id, start, limit)
    except Exception as error:
        if isinstance(error, (AdapterError, *compat.STACK_ERRORS)):
            raise
        # Whatever a dataset provider raises (pandas, the file system, a hub): the reason is in the dataset, and the
        # stack would answer most of it with a bare 500.
        raise RequestRefused(
            f"Dataset '{dataset_id}' cannot be read by the stack's datasetio: {type(error).__name__}: {error}"
        ) from error
