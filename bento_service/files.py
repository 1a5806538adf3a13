"""Uploaded bytes on disk, content-addressed: ``TRL_HOME/files/<2 hex>/<sha256>``.

A caller's file name never becomes a path. The same bytes are stored once, however often they are uploaded.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bento_service.errors import NotFound, TooLarge


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """What lies on disk after a commit."""

    sha256: str
    bytes: int


class IncomingFile:
    """Bytes on their way in: hashed and counted while they are written to a temporary file.

    A context manager; left without ``commit``, nothing stays on disk. Blocking, one thread at a time.
    """

    def __init__(self, storage: "FileStorage") -> None:
        self._storage = storage
        self._hash = hashlib.sha256()
        self._committed = False
        self.bytes = 0
        descriptor, name = tempfile.mkstemp(prefix="upload-", dir=storage.incoming)
        self._file = os.fdopen(descriptor, "wb")
        self._temporary = Path(name)

    def write(self, chunk: bytes) -> None:
        """Append a chunk. Raises TooLarge once the storage's limit is passed."""
        self.bytes += len(chunk)
        if self.bytes > self._storage.max_bytes:
            raise TooLarge(
                f"The file is larger than the {self._storage.max_bytes} bytes this service accepts: "
                "upload a smaller file, or raise TRL_MAX_FILE_BYTES on the service.",
                param="file",
            )
        self._hash.update(chunk)
        self._file.write(chunk)

    def commit(self) -> StoredBytes:
        """Flush to disk and move to the final place; from here on a crash loses nothing."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._hash.hexdigest()
        target = self._storage.path_of(digest)
        new_folder = not target.parent.exists()
        target.parent.mkdir(exist_ok=True)
        self._temporary.replace(target)
        self._committed = True
        _sync_directory(target.parent)
        if new_folder:
            _sync_directory(target.parent.parent)
        return StoredBytes(sha256=digest, bytes=self.bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._committed:
            self._temporary.unlink(missing_ok=True)


class FileStorage:
    """The folder of uploaded files. ``max_bytes`` bounds a single one."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        # On the same file system as the files themselves, so that a commit is a rename.
        self.incoming = root / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)

    def receive(self) -> IncomingFile:
        """A new file to write to."""
        return IncomingFile(self)

    def path_of(self, sha256: str) -> Path:
        """Where the bytes with this digest lie, or would."""
        return self.root / sha256[:2] / sha256

    def existing_path(self, sha256: str) -> Path:
        """``path_of`` for bytes that must be there. Raises NotFound when they are not."""
        path = self.path_of(sha256)
        if not path.is_file():
            raise NotFound(f"The bytes {sha256} are not in {self.root}: was the folder changed by hand? Upload again.")
        return path

    def delete(self, sha256: str) -> None:
        """Remove the bytes; no error when they are gone already."""
        self.path_of(sha256).unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Delete what uploads of a dead process left half-written. Only while no upload is in progress."""
        for path in self.incoming.iterdir():
            path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
