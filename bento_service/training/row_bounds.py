"""How much a data file may ask of its reader, and what is said when it cannot be read on."""

import sys
from dataclasses import dataclass

from bento_service.training.dataset_report import Defect, DefectCode, Row

CHUNK_BYTES = 2**20  # read at once

# What is read by default.
ROW_BYTES = 16 * 2**20
ROWS = 10_000_000

# Lists and objects inside one another. pydantic-core's parser refuses more than 201, and the standard library's, which
# words the errors, is held to the same.
MAX_DEPTH = 200

NumberedRow = tuple[int, Row | Defect]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is read of a file. None: no bound.

    ``row_bytes`` bounds the memory that reading takes, as one row is held whole; ``unpacked_bytes`` what a compressed
    file (gzip, Parquet) may unpack to. The defaults are those of TRL_MAX_ROW_BYTES, TRL_MAX_ROWS and
    TRL_MAX_FILE_BYTES.
    """

    row_bytes: int = ROW_BYTES
    rows: int | None = ROWS  # rows, good or bad; of JSON Lines and CSV also blank lines
    unpacked_bytes: int | None = 5 * 2**30
    parquet_bytes: int | None = 2**30  # memory that decoding Parquet may take

    def require_number(self, number: int) -> None:
        """Raises Unreadable when the row of this number is one too many."""
        if self.rows is not None and number > self.rows:
            reason = f"is one more than the {self.rows} rows that a file may have: split it"
            raise Unreadable(reason, "too_many_rows", number)

    def require_unpacked(self, size: int) -> None:
        """Raises Unreadable when this many bytes are too many."""
        if self.unpacked_bytes is not None and size > self.unpacked_bytes:
            raise self.unpacks_to_more()

    def unpacks_to_more(self) -> "Unreadable":
        reason = f"is where the unpacked file passes {self.unpacked_bytes} bytes, the most that is read: split it"
        return Unreadable(reason, "too_long")

    def too_long(self) -> Defect:
        mebibytes = self.row_bytes / 2**20
        size = f"{mebibytes:g} MiB" if mebibytes >= 1 else f"{self.row_bytes} bytes"
        return Defect("too_long", None, f"is longer than {size}, the most a row may have")

    def endless(self, lacking: str) -> "Unreadable":
        """A row that is too long and whose end, and so the next one's beginning, is not known."""
        return Unreadable(f"{self.too_long().reason}, or lacks {lacking}; nothing after it is read", "too_long")


DEFAULT_BOUNDS = Bounds()
# For a file that was checked when its job was submitted.
UNBOUNDED = Bounds(row_bytes=sys.maxsize - 1, rows=None, unpacked_bytes=None, parquet_bytes=None)


class Unreadable(Exception):
    """The rest of a file cannot be read; the message says why, as the reason of a defect.

    ``row`` is where that is; None for the one after the last that was read.
    """

    def __init__(self, reason: str, code: DefectCode = "unreadable", row: int | None = None) -> None:
        super().__init__(reason)
        self.row = row
        self.reason = reason
        self.code: DefectCode = code
