"""A registered dataset as one JSON Lines file, written page by page so that memory holds one page of it."""

import asyncio
import hashlib
import json
import math
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from . import compat
from .errors import AdapterError, RequestRefused

# What localfs of Llama Stack reads by itself (llama_stack.providers.utils.datasetio.url_utils).
TABLES = (".csv", ".xlsx")
READABLE = "rows, .csv and .xlsx URIs, data: URIs with a text type, and .jsonl files on the stack's host"


@dataclass(frozen=True)
class DatasetFile:
    """The spooled rows. ``file`` is open for reading and vanishes with the context that made it."""

    dataset_id: str
    file: BinaryIO
    rows: int
    sha256: str  # of the file's bytes


@asynccontextmanager
async def spooled(dataset: Any, datasetio: Any, page_rows: int) -> AsyncIterator[DatasetFile]:
    """The dataset's rows in a temporary file. The same rows give the same bytes.

    Raises RequestRefused for a dataset that is empty, that cannot be read, or that holds a value JSON cannot.
    """
    dataset_id = dataset.identifier
    with tempfile.TemporaryFile(prefix="trl-remote-") as file:
        spool = _Spool(dataset_id, file)
        if (path := local_jsonl(dataset)) is not None:
            await asyncio.to_thread(spool.copy, path)
        else:
            start, more = 0, True
            while more:
                page, more = await _read(datasetio, dataset_id, start, page_rows)
                if more and not page:
                    raise RequestRefused(
                        f"Dataset '{dataset_id}': datasetio gave no rows from row {start} on but says there are more"
                    )
                await asyncio.to_thread(spool.append, page)
                start += len(page)
        if not spool.rows:
            raise RequestRefused(f"Dataset '{dataset_id}' is empty: register it with at least one row")
        yield DatasetFile(dataset_id, file, spool.rows, spool.digest.hexdigest())


def local_jsonl(dataset: Any) -> Path | None:
    """The .jsonl file that the adapter itself reads; None where datasetio reads the dataset.

    Raises RequestRefused for a URI that neither can read.
    """
    if dataset.source.type != "uri":
        return None
    uri = dataset.source.uri
    if uri.startswith(("huggingface://", "data:text/")) or uri.endswith(TABLES):
        return None
    # No urlsplit for a plain path: '#' and '?' are part of a file's name.
    if "://" not in uri and not uri.startswith("data:") and uri.endswith(".jsonl"):
        return Path(uri).absolute()
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.endswith(".jsonl"):
        return Path(unquote(parts.path))
    shown = uri if len(uri) <= 100 else f"{uri[:100]}..."
    raise RequestRefused(
        f"Dataset '{dataset.identifier}': Llama Stack cannot read the URI {shown!r}. What works: {READABLE}"
    )


class _Spool:
    """Counts and hashes what it writes."""

    def __init__(self, dataset_id: str, file: BinaryIO) -> None:
        self.rows = 0
        self.digest = hashlib.sha256()
        self._dataset_id = dataset_id
        self._file = file

    def append(self, page: list[dict[str, Any]]) -> None:
        for row in page:
            self._write(self._line(row))

    def copy(self, path: Path) -> None:
        try:
            # Only a regular file: opening a pipe or a device could wait for ever.
            if not path.is_file():
                raise RequestRefused(f"Dataset '{self._dataset_id}': there is no file {path} on the stack's host")
            with path.open("rb") as source:
                for line in source:
                    if line.strip():
                        self._write(line.rstrip(b"\r\n") + b"\n")
        except OSError as error:
            raise RequestRefused(
                f"Dataset '{self._dataset_id}': {path} cannot be read on the stack's host: {error.strerror}"
            ) from error

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self.digest.update(line)
        self.rows += 1

    def _line(self, row: dict[str, Any]) -> bytes:
        try:
            text = json.dumps(cleaned(row), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
            return text.encode() + b"\n"
        except (TypeError, ValueError) as error:  # ValueError: infinity, or a lone surrogate
            raise RequestRefused(
                f"Dataset '{self._dataset_id}', row {self.rows + 1} cannot be written as JSON: {error}"
            ) from error


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
    except (AdapterError, compat.LlamaStackError, PermissionError):
        raise
    except Exception as error:
        # Whatever a dataset provider raises (pandas, the file system, a hub): the reason is in the dataset, and the
        # stack would answer most of it with a bare 500.
        raise RequestRefused(
            f"Dataset '{dataset_id}' cannot be read by the stack's datasetio: {type(error).__name__}: {error}"
        ) from error
