"""Data files as rows: JSON Lines, a JSON array, CSV or Parquet, each also gzipped.

The container is told by the file's first bytes, never by its name. Rows come as a stream; memory is bounded by the
longest accepted row, not by the file. What is wrong inside a file comes as a Defect in place of the row.
"""

import codecs
import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from pydantic_core import from_json

from bento_service.training.dataset_report import Defect, DefectCode, Row, kind

ContainerName = Literal["jsonl", "json", "csv", "parquet"]

MAX_ROW_BYTES = 16 * 2**20  # longest accepted row; it is held in memory whole
HEAD_BYTES = 64 * 1024  # how far a file is looked into to tell its container
CHUNK_BYTES = 2**20
# Rows decoded at once from Parquet: its dictionaries let a small file hold many long values.
PARQUET_BATCH = 16

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

NumberedRow = tuple[int, Row | Defect]


class Unreadable(Exception):
    """The rest of a file cannot be read; the message says why, as the reason of a defect."""

    def __init__(self, reason: str, code: DefectCode = "unreadable") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code: DefectCode = code


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


def read(
    path: Path, container: Container, columns: Collection[str], *, max_bytes: int | None = None
) -> Iterator[NumberedRow]:
    """Number and content of every row. A Defect stands for a row that is none, and for what ends the reading.

    Numbers are lines of JSON Lines, else they count rows from 1 (without CSV's header). Of Parquet only ``columns``
    are read, and without the ones that are null. ``max_bytes`` bounds what a compressed file (gzip, Parquet) may
    unpack to. Raises OSError when the file cannot be read.
    """
    number = 0
    try:
        if container.name is None:
            if container.reason is not None:
                raise Unreadable(container.reason)
            return
        with ExitStack() as stack:
            file: BinaryIO = stack.enter_context(path.open("rb"))
            if container.gzipped:
                file = stack.enter_context(cast(BinaryIO, io.BufferedReader(_Unpacked(file, max_bytes), CHUNK_BYTES)))
            if container.name == "parquet":
                rows = _parquet(file, columns, gzipped=container.gzipped, max_bytes=max_bytes)
            else:
                rows = {"jsonl": _json_lines, "json": _json_array, "csv": _csv}[container.name](file)
            for number, row in rows:
                yield number, row
    except Unreadable as error:
        yield number + 1, Defect(error.code, None, error.reason)


class _Unpacked(io.RawIOBase):
    """A gzipped file's content. Raises Unreadable when it is broken or more than ``max_bytes``."""

    def __init__(self, file: BinaryIO, max_bytes: int | None) -> None:
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._room = max_bytes
        self._max_bytes = max_bytes

    def readable(self) -> bool:
        return True

    # The annotation of RawIOBase needs collections.abc.Buffer; a memoryview is what BufferedReader gives.
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            size = self._gzip.readinto1(buffer)  # what comes before a break is given, too
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Unreadable(f"is where the gzip data breaks: {error}") from error
        if self._room is not None and self._max_bytes is not None:
            self._room -= size
            if self._room < 0:
                raise Unreadable(_unpacks_to_more(self._max_bytes), "too_long")
        return size

    def close(self) -> None:
        self._gzip.close()
        super().close()


def _unpacks_to_more(max_bytes: int) -> str:
    return f"is where the unpacked file passes {max_bytes} bytes, the most that is read: split it"


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


def _json_lines(file: BinaryIO) -> Iterator[NumberedRow]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK_BYTES)
            yield number, _too_long()
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line and not line.isspace():
            try:
                row = from_json(line, allow_inf_nan=False, cache_strings="keys")
            except ValueError:
                row = None
            # Nearly every row is an object, and this loop is what the time goes into.
            yield number, row if type(row) is dict else parse_row(line)


# A string, a lone quote that opens one that is not all read yet, or what gives an array its structure. Possessive,
# so that a string without end is given up at once.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


def _json_array(file: BinaryIO) -> Iterator[NumberedRow]:
    """The items of an array, each cut out by its brackets and parsed alone."""
    buffer = file.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    start = position = 1  # after the bracket that opens the array
    number = depth = 0
    while True:
        open_string: int | None = None
        for token in _TOKEN.finditer(buffer, position):
            mark = buffer[token.start()]
            if mark == 0x22:  # a quote
                if token.end() - token.start() == 1:
                    open_string = token.start()
                    break
            elif mark in b"[{":
                depth += 1
            elif mark == 0x2C:  # a comma
                if depth == 0:
                    number += 1
                    yield number, _parse_item(buffer[start : token.start()])
                    start = token.end()
            elif depth > 0:
                depth -= 1
            else:
                item = buffer[start : token.start()]
                if number or item.strip():
                    number += 1
                    yield number, _parse_item(item)
                if mark != 0x5D:
                    raise Unreadable("is not JSON: a } closes the array", "not_json")
                _require_end(file, buffer[token.end() :])
                return
        scanned = len(buffer) if open_string is None else open_string
        if len(buffer) - start > MAX_ROW_BYTES:
            raise Unreadable(
                f"{_too_long().reason}, or lacks a quote or a bracket; nothing after it is read", "too_long"
            )
        # As much again as is kept, so that a long item is not scanned over and over.
        chunk = file.read(max(CHUNK_BYTES, len(buffer) - start))
        if not chunk:
            raise Unreadable("is not JSON: the file ends before the array is closed", "not_json")
        buffer, position, start = buffer[start:] + chunk, scanned - start, 0


def _parse_item(item: bytes) -> Row | Defect:
    if len(item) > MAX_ROW_BYTES:
        return _too_long()
    if not item.strip():
        return Defect("not_json", None, "is not JSON: nothing between two commas, or after the last one")
    return parse_row(item)


def _require_end(file: BinaryIO, rest: bytes) -> None:
    while rest:
        if rest.strip():
            raise Unreadable("is after the end of the JSON array: one file holds one array", "not_json")
        rest = file.read(CHUNK_BYTES)


def parse_row(text: bytes) -> Row | Defect:
    """The JSON object in these bytes, or what is wrong with them."""
    try:
        row = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        if "recursion limit" in str(error):
            return Defect("too_deep", None, "is nested too deep", _shown(text))
        row = _parse_slowly(text)
    if not isinstance(row, dict | Defect):
        return Defect("not_an_object", None, f"must be a JSON object, not {kind(row)}", row)
    return row


def _parse_slowly(text: bytes) -> object:
    """By the standard library, whose messages say more; it also takes half of a surrogate pair and long numbers."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        return Defect("not_utf8", None, f"is not UTF-8 at byte {error.start}", _shown(text))
    try:
        value = json.loads(decoded, parse_constant=_refuse_constant)
        return next(_lone_surrogates(value), value)
    except json.JSONDecodeError as error:
        return Defect("not_json", None, f"is not JSON: {error.msg} at column {error.colno}", _shown(text))
    except RecursionError:
        return Defect("too_deep", None, "is nested too deep", _shown(text))
    except ValueError as error:  # NaN, or a number too long
        return Defect("not_json", None, f"is not JSON: {error}", _shown(text))


def _lone_surrogates(value: object, place: str = "") -> Iterator[Defect]:
    """Texts that cannot be encoded: JSON can escape one half of a surrogate pair, UTF-8 cannot hold it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            reason = f"holds half of a surrogate pair at character {error.start}"
            yield Defect("surrogate", place or None, reason, ascii(value))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _lone_surrogates(item, f"{place}.{index}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _lone_surrogates(name, place)
            yield from _lone_surrogates(item, f"{place}.{name}".lstrip("."))


def _shown(text: bytes) -> str:
    return text[:1000].decode("utf-8", "replace").strip()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _too_long() -> Defect:
    return Defect("too_long", None, f"is longer than {MAX_ROW_BYTES // 2**20} MiB")


def _csv(file: BinaryIO) -> Iterator[NumberedRow]:
    """Rows of text, by RFC 4180: commas, cells in double quotes where needed; the first line names the columns."""
    csv.field_size_limit(MAX_ROW_BYTES)
    number = 0
    room = MAX_ROW_BYTES

    def lines() -> Iterator[str]:
        # Bytes that are not UTF-8 stay in the row as surrogates, so that only this row is refused.
        nonlocal room
        first = True
        while line := file.readline(room + 1):
            room -= len(line)
            if room < 0:
                raise Unreadable(
                    f"{_too_long().reason}, or lacks a closing quote; nothing after it is read", "too_long"
                )
            yield (line.removeprefix(codecs.BOM_UTF8) if first else line).decode("utf-8", "surrogateescape")
            first = False

    records = csv.reader(lines(), strict=True)
    try:
        header = next(filter(None, records), [])
        if doubled := sorted({name for name in header if header.count(name) > 1}):
            raise Unreadable(f"has no clear columns: the header names {', '.join(doubled)} twice")
        room = MAX_ROW_BYTES
        for cells in records:
            room = MAX_ROW_BYTES
            if cells:
                number += 1
                yield number, _csv_row(header, cells)
    except csv.Error as error:
        raise Unreadable(f"is not CSV: {error}; nothing after it is read") from error


def _csv_row(header: list[str], cells: list[str]) -> Row | Defect:
    if len(cells) != len(header):
        return Defect("cells", None, f"has {len(cells)} cells and the header {len(header)}", ",".join(cells))
    for name, cell in zip(header, cells, strict=True):
        if cell.isascii():
            continue
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            shown = cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            return Defect("not_utf8", name, f"is not UTF-8 at character {error.start}", shown)
    return dict(zip(header, cells, strict=True))


def _parquet(
    file: BinaryIO, columns: Collection[str], *, gzipped: bool, max_bytes: int | None
) -> Iterator[NumberedRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    with ExitStack() as stack:
        if gzipped:  # Parquet is read from its end, so it is unpacked to a temporary file
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, CHUNK_BYTES)
            unpacked.seek(0)
            file = cast(BinaryIO, unpacked)
        number = 0
        try:
            parquet = stack.enter_context(pyarrow.parquet.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False))
            known = [name for name in parquet.schema_arrow.names if name in columns]
            if not known:
                raise Unreadable(f"has no known column; the Parquet file has {', '.join(parquet.schema_arrow.names)}")
            size = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
            if max_bytes is not None and size > max_bytes:
                raise Unreadable(_unpacks_to_more(max_bytes), "too_long")
            seen = 0
            for batch in parquet.iter_batches(PARQUET_BATCH, columns=known, use_threads=False):
                seen += batch.nbytes
                if max_bytes is not None and seen > max_bytes:
                    raise Unreadable(_unpacks_to_more(max_bytes), "too_long")
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Unreadable(f"is where the Parquet file breaks: {str(error).splitlines()[0]}") from error


def _batch_rows(batch: Any) -> Iterator[Row | Defect]:
    """The rows of a pyarrow.RecordBatch."""
    rows: list[Row | Defect]
    try:
        if batch.nbytes > MAX_ROW_BYTES:
            rows = [_batch_row(batch, index) for index in range(batch.num_rows)]
        else:
            rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_batch_row(batch, index) for index in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, Defect) else {name: value for name, value in row.items() if value is not None}


def _batch_row(batch: Any, index: int) -> Row | Defect:
    row = batch.slice(index, 1)
    if row.nbytes > MAX_ROW_BYTES:
        return _too_long()
    try:
        return cast(Row, row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Defect("not_utf8", None, f"is not UTF-8 at byte {error.start} of a value")
