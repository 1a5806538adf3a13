"""Rows of tables, CSV and Parquet, as a stream."""

import codecs
import csv
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

from bento_service.training import row_bounds
from bento_service.training.dataset_report import Defect, Row
from bento_service.training.row_bounds import NumberedRow, Unreadable

# Rows decoded at once from Parquet: its dictionaries let a small file hold many long values.
PARQUET_BATCH = 16


def csv_rows(file: BinaryIO) -> Iterator[NumberedRow]:
    """Rows of text, by RFC 4180: commas, cells in double quotes where needed; the first line names the columns."""
    csv.field_size_limit(row_bounds.MAX_ROW_BYTES)
    number = 0
    room = row_bounds.MAX_ROW_BYTES

    def lines() -> Iterator[str]:
        # Bytes that are not UTF-8 stay in the row as surrogates, so that only this row is refused.
        nonlocal room
        first = True
        while line := file.readline(room + 1):
            room -= len(line)
            if room < 0:
                raise Unreadable(
                    f"{row_bounds.too_long().reason}, or lacks a closing quote; nothing after it is read", "too_long"
                )
            yield (line.removeprefix(codecs.BOM_UTF8) if first else line).decode("utf-8", "surrogateescape")
            first = False

    records = csv.reader(lines(), strict=True)
    try:
        header = next(filter(None, records), [])
        if doubled := sorted({name for name in header if header.count(name) > 1}):
            raise Unreadable(f"has no clear columns: the header names {', '.join(doubled)} twice")
        room = row_bounds.MAX_ROW_BYTES
        for cells in records:
            room = row_bounds.MAX_ROW_BYTES
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


def parquet_rows(
    file: BinaryIO, columns: Collection[str], *, gzipped: bool, max_bytes: int | None
) -> Iterator[NumberedRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    with ExitStack() as stack:
        if gzipped:  # Parquet is read from its end, so it is unpacked to a temporary file
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, row_bounds.CHUNK_BYTES)
            unpacked.seek(0)
            file = cast(BinaryIO, unpacked)
        number = 0
        try:
            parquet = stack.enter_context(
                pyarrow.parquet.ParquetFile(file, buffer_size=row_bounds.CHUNK_BYTES, pre_buffer=False)
            )
            known = [name for name in parquet.schema_arrow.names if name in columns]
            if not known:
                raise Unreadable(f"has no known column; the Parquet file has {', '.join(parquet.schema_arrow.names)}")
            size = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
            if max_bytes is not None and size > max_bytes:
                raise Unreadable(row_bounds.unpacks_to_more(max_bytes), "too_long")
            seen = 0
            for batch in parquet.iter_batches(PARQUET_BATCH, columns=known, use_threads=False):
                seen += batch.nbytes
                if max_bytes is not None and seen > max_bytes:
                    raise Unreadable(row_bounds.unpacks_to_more(max_bytes), "too_long")
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
        if batch.nbytes > row_bounds.MAX_ROW_BYTES:
            rows = [_batch_row(batch, index) for index in range(batch.num_rows)]
        else:
            rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_batch_row(batch, index) for index in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, Defect) else {name: value for name, value in row.items() if value is not None}


def _batch_row(batch: Any, index: int) -> Row | Defect:
    row = batch.slice(index, 1)
    if row.nbytes > row_bounds.MAX_ROW_BYTES:
        return row_bounds.too_long()
    try:
        return cast(Row, row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Defect("not_utf8", None, f"is not UTF-8 at byte {error.start} of a value")
