"""A file whose size is known, read without following links: what the service hands out."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bento_service.errors import UnreadableRun

CHUNK_BYTES = 1 << 20


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading. Raises FileNotFoundError, and UnreadableRun for a link, a pipe or a device."""
    try:
        # Without waiting for somebody to write to a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableRun(f"{path.name} is not a plain file: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableRun(f"{path.name} is not a plain file")
    return os.fdopen(descriptor, "rb")


@dataclass(frozen=True, kw_only=True)
class PlainFile:
    """``sha256`` is None where it was never taken: in checkpoints of older versions."""

    name: str  # what it is handed out as; never a path of this host
    path: Path
    size: int  # bytes
    sha256: str | None

    def open(self) -> BinaryIO:
        """Raises UnreadableRun for what is no plain file of the size that is on record."""
        try:
            file = open_plain(self.path)
        except FileNotFoundError as error:
            raise UnreadableRun(f"{self.name} cannot be read: {error.strerror}") from error
        if os.fstat(file.fileno()).st_size != self.size:
            file.close()
            raise UnreadableRun(f"{self.name} is not the file of {self.size} bytes that was saved")
        return file

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``, in pieces of at most ``CHUNK_BYTES``. Raises UnreadableRun."""
        with self.open() as file:
            file.seek(start)
            left = stop - start
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise UnreadableRun(f"{self.name} was cut short while it was read")
                left -= len(chunk)
                yield chunk
