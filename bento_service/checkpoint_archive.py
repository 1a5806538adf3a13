"""A complete checkpoint as it is handed out: its published files, one by one and as one tar."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from bento_service.errors import NotFound, NotReady, UnreadableRun
from bento_service.plain_file import PlainFile
from bento_service.training.checkpoints import Manifest, read_manifest
from bento_service.training.run_directory import COMPLETE_MARKER, RunDirectory


class CheckpointArchive:
    """The tar of a checkpoint: uncompressed, its members in order of their names in a folder ``checkpoint-<step>``.

    The same checkpoint gives the same bytes, always: no times, owners or permissions of this host are in it. So its
    size is known before a byte is read, and a download that was cut off can go on where it ended.
    """

    def __init__(self, job_id: str, folder: Path, manifest: Manifest) -> None:
        self.name = f"{job_id}-{folder.name}.tar"
        self._folder = folder
        self._manifest = manifest

    @cached_property
    def members(self) -> list[PlainFile]:
        """The published files. Raises UnreadableRun for a name that leads out of the checkpoint."""
        root = self._folder.resolve()
        members = []
        for name, size in self._manifest.published.items():
            path = self._folder / name
            if not path.resolve().is_relative_to(root):
                raise UnreadableRun(f"{name!r} leads out of the checkpoint: a link, or a damaged marker")
            members.append(PlainFile(name=name, path=path, size=size, sha256=self._manifest.sha256.get(name)))
        return members

    def member(self, name: str) -> PlainFile:
        """The published file of this name; nothing is looked up but the manifest. Raises NotFound, UnreadableRun."""
        for member in self.members:
            if member.name == name:
                with member.open():  # it is what the manifest says
                    return member
        names = ", ".join(member.name for member in self.members)
        raise NotFound(f"{self._folder.name} has no file {name[:100]!r}; it has {names}.")

    @property
    def etag(self) -> str:
        """Tells one content from another, without the quotes that HTTP puts around it."""
        contents = [(member.name, member.size, member.sha256) for member in self.members]
        if any(digest is None for _, _, digest in contents):  # an older checkpoint: by when it was completed
            contents.append((COMPLETE_MARKER, (self._folder / COMPLETE_MARKER).stat().st_mtime_ns, None))
        return hashlib.sha256(json.dumps([self.name, contents]).encode()).hexdigest()

    @cached_property
    def size(self) -> int:
        """Length of the tar, bytes."""
        blocks = sum(len(self._header(member)) + _padded(member.size) for member in self.members)
        # Two empty blocks end it, filled up to a whole record, as tar itself writes.
        return _padded(blocks + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``, in pieces of at most ``plain_file.CHUNK_BYTES``.

        Raises UnreadableRun when a file is gone or changed.
        """
        stop = self.size if stop is None else stop
        position = 0
        for member in self.members:
            header = self._header(member)
            yield header[max(0, start - position) : max(0, stop - position)]
            position += len(header)
            end = position + member.size
            if start < end and stop > position:
                yield from member.read(max(0, start - position), min(member.size, stop - position))
            position = end
            padding = bytes(_padded(member.size) - member.size)
            yield padding[max(0, start - position) : max(0, stop - position)]
            position += len(padding)
        yield bytes(max(0, stop - max(start, position)))

    def _header(self, member: PlainFile) -> bytes:
        info = tarfile.TarInfo(f"{self._folder.name}/{member.name}")
        info.size = member.size
        info.mode = 0o644
        return info.tobuf(tarfile.PAX_FORMAT)  # time, owner and group are 0


def open_checkpoint(run: RunDirectory, job_id: str, step: int, *, ended: bool) -> CheckpointArchive:
    """The complete checkpoint of a step.

    Raises NotReady while it is being written, NotFound when there is none (``ended``: and none will come), and
    UnreadableRun when it does not lie in the run's directory or its marker is damaged.
    """
    folder = run.checkpoints / f"checkpoint-{step}"
    if not folder.is_dir():
        raise NotFound(
            f"Job {job_id} has no checkpoint of step {step}; GET .../{job_id}/checkpoints lists those it has."
        )
    if folder.resolve() != run.path.resolve() / "checkpoints" / folder.name:
        raise UnreadableRun(f"checkpoint-{step} of job {job_id} is a link that leads out of its run directory")
    try:
        return CheckpointArchive(job_id, folder, read_manifest(folder))
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        raise UnreadableRun(f"the marker of checkpoint-{step} of job {job_id} cannot be read: {error}") from error
    if ended:
        raise NotFound(f"The checkpoint of step {step} of job {job_id} was not saved to the end.")
    raise NotReady(f"The checkpoint of step {step} of job {job_id} is still being written: try again in some seconds.")


def _padded(size: int, block: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // block) * block
