"""Reading a trainer's log a bounded piece at a time, while the trainer writes it."""

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

from bento_service.plain_file import open_plain

# A character of UTF-8 has at most this many bytes.
_CHARACTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class LogPage:
    """A piece of a log. Offsets are bytes from the file's start."""

    offset: int  # where the content starts
    next_offset: int  # where the next piece starts
    size: int  # of the file when it was read
    truncated: bool  # the offset asked for is past the end: the log was rotated, and this starts at 0
    content: str


def read_page(log: Path, *, offset: int, limit: int) -> LogPage:
    """At most ``limit`` bytes (4 or more) from ``offset`` on. A log that is not there is empty.

    A character that is cut by the limit, or only half written yet, is left to the next page; bytes that are no UTF-8
    become U+FFFD. Raises UnreadableRun for a log that is a link.
    """
    try:
        opened = open_plain(log)
    except FileNotFoundError:
        return LogPage(offset=0, next_offset=0, size=0, truncated=offset > 0, content="")
    with opened as file:
        size = file.seek(0, os.SEEK_END)
        start = 0 if offset > size else offset
        file.seek(start)
        data = file.read(limit)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    content = decoder.decode(data)
    pending = decoder.getstate()[0]
    if pending and len(pending) == len(data):
        # Half a character and nothing after it: the trainer that wrote it died.
        content, pending = decoder.decode(b"", final=True), b""
    return LogPage(
        offset=start,
        next_offset=start + len(data) - len(pending),
        size=max(size, start + len(data)),
        truncated=offset > size,
        content=content,
    )


def read_tail(log: Path, *, lines: int, limit: int) -> LogPage:
    """The last ``lines`` lines, of which the last ``limit`` bytes."""
    try:
        opened = open_plain(log)
    except FileNotFoundError:
        return read_page(log, offset=0, limit=limit)
    with opened as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - limit))
        data = file.read(limit)
    kept = b"".join(data.splitlines(keepends=True)[-lines:])
    if len(kept) == limit < size:
        # Perhaps cut inside a character, whose other bytes are not text by themselves.
        head = kept[: _CHARACTER_BYTES - 1]
        kept = kept[next((n for n, byte in enumerate(head) if byte & 0xC0 != 0x80), len(head)) :]
    return read_page(log, offset=size - len(kept), limit=max(len(kept), _CHARACTER_BYTES))
