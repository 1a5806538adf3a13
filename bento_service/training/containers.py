"""Data files as rows: JSON Lines, a JSON array, CSV or Parquet, each also gzipped.

The container is told by the file's first bytes, never by its name. Rows come as a stream; memory is bounded by the
longest accepted row, not by the file. What is wrong inside a file comes as a Defect in place of the row.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from pydantic_core import from_json

from bento_service.training import row_bounds
from bento_service.training.csv_rows import csv_rows
from bento_service.training.dataset_report import Defect
from bento_service.training.json_rows import json_array, json_lines
from bento_service.training.parquet_rows import parquet_rows
from bento_service.training.row_bounds import Bounds, NumberedRow, Unreadable

ContainerName = Literal["jsonl", "json", "csv", "parquet"]

BUFFER_BYTES = 128 * 1024  # a line of 2 kB is read in half the time that it takes with Python's 8 KiB
HEAD_BYTES = 64 * 1024  # how far a file is looked into to tell its container

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
# What people upload by mistake, by its first bytes.
FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"BZh": "compressed with bzip2: use gzip",
    b"\xfd7zXZ": "compressed with xz: use gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: use gzip",
    b"ARROW1": "an Arrow file: save it as Parquet",
    codecs.BOM_UTF16_LE: "UTF-16 text: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: save it as UTF-8",
    GZIP: "gzipped twice: once is enough",
}


@dataclass(frozen=True)
class Container:
    """What a file is, by its first bytes. ``name`` is None for an empty file and for what is none of the four."""

    name: ContainerName | None
    gzipped: bool
    reason: str | None = None  # why it is none of the four; None for an empty file


def identify(path: Path, columns: Collection[str]) -> Container:
    """The container of a file; ``columns`` are the names by which the header of a CSV file is known.

    Raises OSError when the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    gzipped = head.startswith(GZIP)
    if gzipped:
        head = b""
        try:
            with gzip.open(path, "rb") as unpacked:
                while len(head) < HEAD_BYTES and (part := unpacked.read1(HEAD_BYTES)):
                    head += part
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            if not head:
                return Container(None, gzipped, f"is broken gzip: {error}")
    name, reason = _tell(head, columns)
    return Container(name, gzipped, reason)


def read(path: Path, container: Container, columns: Collection[str], bounds: Bounds) -> Iterator[NumberedRow]:
    """Number and content of every row. A Defect stands for a row that is none, and for what ends the reading.

    Numbers are lines of JSON Lines, else they count rows from 1 (without CSV's header). Of Parquet only ``columns``
    are read, and without the ones that are null. Raises OSError when the file cannot be read.
    """
    number = 0
    try:
        if container.name is None:
            if container.reason is not None:
                raise Unreadable(container.reason)
            return
        with ExitStack() as stack:
            file: BinaryIO = stack.enter_context(path.open("rb", BUFFER_BYTES))
            if container.gzipped:
                file = stack.enter_context(
                    cast(BinaryIO, io.BufferedReader(_Unpacked(file, bounds), row_bounds.CHUNK_BYTES))
                )
            if container.name == "parquet":
                rows = parquet_rows(file, columns, bounds, gzipped=container.gzipped)
            else:
                rows = {"jsonl": json_lines, "json": json_array, "csv": csv_rows}[container.name](file, bounds)
            for number, row in rows:
                yield number, row
    except Unreadable as error:
        yield error.row or number + 1, Defect(error.code, None, error.reason)


class _Unpacked(io.RawIOBase):
    """A gzipped file's content. Raises Unreadable when it is broken or out of bounds."""

    def __init__(self, file: BinaryIO, bounds: Bounds) -> None:
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._bounds = bounds
        self._size = 0

    def readable(self) -> bool:
        return True

    # The annotation of RawIOBase needs collections.abc.Buffer; a memoryview is what BufferedReader gives.
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            size = self._gzip.readinto1(buffer)  # what comes before a break is given, too
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Unreadable(f"is where the gzip data breaks: {error}") from error
        self._size += size
        self._bounds.require_unpacked(self._size)
        return size

    def close(self) -> None:
        self._gzip.close()
        super().close()


def _tell(head: bytes, columns: Collection[str]) -> tuple[ContainerName | None, str | None]:
    """Name of the container that begins with these bytes, or why there is none."""
    if head.startswith(PARQUET):
        return "parquet", None
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            return None, f"is not data that can be read: the file is {what}"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        return (None, None) if len(head) < HEAD_BYTES else ("jsonl", None)
    if text.startswith(b"{"):
        return "jsonl", None
    if text.startswith(b"["):
        return "json", None
    first, *others = text.splitlines()
    for delimiter in ",;\t|":
        cells = {cell.strip(" \"'") for cell in first.decode("utf-8", "replace").split(delimiter)}
        if cells & set(columns):
            if delimiter == "," or len(cells) == 1:
                return "csv", None
            return None, f"is a CSV header with {delimiter!r} between the columns: use commas"
    if _is_json(first) or any(line.lstrip().startswith(b"{") for line in others):
        return "jsonl", None
    return None, "is neither JSON nor a CSV header with a known column: give JSON Lines, a JSON array, CSV or Parquet"


def _is_json(line: bytes) -> bool:
    try:
        from_json(line)
    except ValueError:
        return False
    return True
