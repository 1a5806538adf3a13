"""Rows of JSON Lines and of a JSON array, as a stream."""

import codecs
import json
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

from pydantic_core import from_json

from bento_service.training import row_bounds
from bento_service.training.dataset_report import Defect, Row, kind
from bento_service.training.row_bounds import MAX_DEPTH, Bounds, NumberedRow, Unreadable


def json_lines(file: BinaryIO, bounds: Bounds) -> Iterator[NumberedRow]:
    number = 0
    most, longest = sys.maxsize if bounds.rows is None else bounds.rows, bounds.row_bytes
    while line := file.readline(longest + 1):
        number += 1
        if number > most:
            bounds.require_number(number)
        if len(line) > longest:
            while line and not line.endswith(b"\n"):
                line = file.readline(row_bounds.CHUNK_BYTES)
            yield number, bounds.too_long()
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


def json_array(file: BinaryIO, bounds: Bounds) -> Iterator[NumberedRow]:
    """The items of an array, each cut out by its brackets and parsed alone."""
    buffer = file.read(row_bounds.CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
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
                    bounds.require_number(number)
                    yield number, _parse_item(buffer[start : token.start()], bounds)
                    start = token.end()
            elif depth > 0:
                depth -= 1
            else:
                item = buffer[start : token.start()]
                if number or item.strip():
                    number += 1
                    bounds.require_number(number)
                    yield number, _parse_item(item, bounds)
                if mark != 0x5D:
                    raise Unreadable("is not JSON: a } closes the array", "not_json")
                _require_end(file, buffer[token.end() :])
                return
        scanned = len(buffer) if open_string is None else open_string
        if len(buffer) - start > bounds.row_bytes:
            raise bounds.endless("a quote or a bracket")
        # As much again as is kept, so that a long item is not scanned over and over.
        chunk = file.read(max(row_bounds.CHUNK_BYTES, len(buffer) - start))
        if not chunk:
            raise Unreadable("is not JSON: the file ends before the array is closed", "not_json")
        buffer, position, start = buffer[start:] + chunk, scanned - start, 0


def _parse_item(item: bytes, bounds: Bounds) -> Row | Defect:
    if len(item) > bounds.row_bytes:
        return bounds.too_long()
    if not item.strip():
        return Defect("not_json", None, "is not JSON: nothing between two commas, or after the last one")
    return parse_row(item)


def _require_end(file: BinaryIO, rest: bytes) -> None:
    while rest:
        if rest.strip():
            raise Unreadable("is after the end of the JSON array: one file holds one array", "not_json")
        rest = file.read(row_bounds.CHUNK_BYTES)


def parse_row(text: bytes) -> Row | Defect:
    """The JSON object in these bytes, or what is wrong with them."""
    try:
        row = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        if "recursion limit" in str(error):
            return _too_deep(text)
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
        return _too_deep(text) if _is_deeper(value, MAX_DEPTH) else next(_lone_surrogates(value), value)
    except json.JSONDecodeError as error:
        return Defect("not_json", None, f"is not JSON: {error.msg} at column {error.colno}", _shown(text))
    except RecursionError:
        return _too_deep(text)
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


def _is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in value))


def _too_deep(text: bytes) -> Defect:
    return Defect("too_deep", None, f"is nested too deep: more than {MAX_DEPTH} levels", _shown(text))


def _shown(text: bytes) -> str:
    return text[:1000].decode("utf-8", "replace").strip()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
