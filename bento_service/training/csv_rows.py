"""Rows of CSV as a stream."""

import codecs
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from bento_service.training.dataset_report import Defect, Row
from bento_service.training.row_bounds import Bounds, NumberedRow, Unreadable


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
