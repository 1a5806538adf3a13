"""Rows of tables, CSV and Parquet, as a stream."""

import codecs
import csv
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

from bento_service.training import row_bounds
from bento_service.training.dataset_report import Defect, Row
from bento_service.training.row_bounds import Bounds, NumberedRow, Unreadable

# Rows decoded at once from Parquet: its dictionaries let a small file hold many long values.
PARQUET_BATCH = 16


def csv_rows(file: BinaryIO, bounds: Bounds) -> Iterator[NumberedRow]:
    """Rows of text, by RFC 4180: commas, cells in double quotes where needed; the first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # of the whole process; ``room`` bounds what one row takes
    number = 0
    room = bounds.row_bytes

    def lines() -> Iterator[str]:
        # Bytes that are not UTF-8 stay in the row as surrogates, so that only this row is refused.
        nonlocal room
        read = 0
        while line := file.readline(room + 1):
            room -= len(line)
            if room < 0:
                raise bounds.endless("a closing quote")
            yield (line if read else line.removeprefix(codecs.BOM_UTF8)).decode("utf-8", "surrogateescape")
            read += 1

    records = csv.reader(lines(), strict=True)
    try:
        header = next(filter(None, records), [])
        if doubled := [name for name, times in Counter(header).items() if times > 1]:
            raise Unreadable(f"has no clear columns: the header names {', '.join(doubled)} twice")
        room = bounds.row_bytes
        for line, cells in enumerate(records, start=1):
            room = bounds.row_bytes
            bounds.require_number(line)
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


def parquet_rows(file: BinaryIO, columns: Collection[str], bounds: Bounds, *, gzipped: bool) -> Iterator[NumberedRow]:
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
            bounds.require_unpacked(size)
            seen = 0
            for batch in parquet.iter_batches(PARQUET_BATCH, columns=known, use_threads=False):
                seen += batch.nbytes
                bounds.require_unpacked(seen)
                for row in _batch_rows(batch, bounds):
                    number += 1
                    bounds.require_number(number)
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Unreadable(f"is where the Parquet file breaks: {str(error).splitlines()[0]}") from error


def _batch_rows(batch: Any, bounds: Bounds) -> Iterator[Row | Defect]:
    """The rows of a pyarrow.RecordBatch."""
    rows: list[Row | Defect]
    try:
        if batch.nbytes > bounds.row_bytes:
            rows = [_batch_row(batch, index, bounds) for index in range(batch.num_rows)]
        else:
            rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_batch_row(batch, index, bounds) for index in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, Defect) else {name: value for name, value in row.items() if value is not None}


def _batch_row(batch: Any, index: int, bounds: Bounds) -> Row | Defect:
    row = batch.slice(index, 1)
    if row.nbytes > bounds.row_bytes:
        return bounds.too_long()
    try:
        return cast(Row, row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Defect("not_utf8", None, f"is not UTF-8 at byte {error.start} of a value")
