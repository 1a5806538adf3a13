"""Checkpoint folders of one run: completing, checking, keeping the newest, clearing away what a kill left."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bento_service.plain_file import open_plain
from bento_service.training.events import EventWriter, read_events
from bento_service.training.run_directory import COMPLETE_MARKER, RunDirectory, mark_complete

# A pickle of TRL's arguments, which nothing here reads; model folders are handed to others without pickled objects.
UNWANTED = "training_args.bin"

# Says of a checkpoint what it is of, with the SHA-256 of every other published file (see ``manifest``).
MANIFEST_FILE = "manifest.json"

# What only a resumed run needs: the optimizer, the scheduler and the random state, all of them pickles.
_RESUME_SUFFIXES = {".pt", ".pth", ".bin", ".pkl"}
_RESUME_FILES = {"trainer_state.json"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the marker of a complete checkpoint says."""

    step: int
    epoch: float
    tokens: int  # trained by then, padding not counted
    final: bool  # of the last step
    files: dict[str, int]  # name inside the checkpoint -> bytes
    sha256: dict[str, str] = field(default_factory=dict)  # of the published files; absent in older markers

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def published(self) -> dict[str, int]:
        """The files that a user of the model needs: name -> bytes, sorted by name."""
        return {name: size for name, size in sorted(self.files.items()) if is_published(name)}


def is_published(name: str) -> bool:
    """Whether a checkpoint's file is handed out; what only resuming needs is not, and no pickle is."""
    return Path(name).suffix not in _RESUME_SUFFIXES and name not in _RESUME_FILES


def complete(
    checkpoint: Path, *, step: int, epoch: float, tokens: int, final: bool, about: Mapping[str, Any] | None = None
) -> Manifest:
    """Mark a checkpoint whose files are all written as complete: the marker is written last, after a flush.

    Before that its ``MANIFEST_FILE`` is written: ``about``, which says of what run it is, the position, and the
    size and SHA-256 of each published file.
    """
    (checkpoint / UNWANTED).unlink(missing_ok=True)
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    sizes = _sizes(checkpoint)
    digests = {name: sha256_of(checkpoint / name) for name in sizes if is_published(name)}
    position = {"step": step, "epoch": epoch, "tokens": tokens, "final": final}
    files = [{"name": name, "bytes": sizes[name], "sha256": digest} for name, digest in digests.items()]
    contents = {**(about or {}), "checkpoint": {**position, "files": files}}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    digests[MANIFEST_FILE] = sha256_of(checkpoint / MANIFEST_FILE)
    manifest = Manifest(step=step, epoch=epoch, tokens=tokens, final=final, files=_sizes(checkpoint), sha256=digests)
    mark_complete(checkpoint, asdict(manifest))
    return manifest


def name_base_model(checkpoint: Path, name: str) -> None:
    """Let an adapter name its base model as the user did: peft writes the folder that it was loaded from.

    Done to the file and not before saving, because peft would ask the hub about a name.
    """
    config = checkpoint / "adapter_config.json"
    if config.exists():
        values = json.loads(config.read_bytes())
        values["base_model_name_or_path"] = name
        config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def sha256_of(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def report(events: EventWriter, checkpoint: Path, manifest: Manifest) -> None:
    events.write(
        "checkpoint",
        f"{checkpoint.name} saved",
        step=manifest.step,
        epoch=manifest.epoch,
        path=str(checkpoint),
        bytes=manifest.bytes,
        final=manifest.final,
    )


def report_missed(events: EventWriter, run: RunDirectory) -> None:
    """Report the complete checkpoints that an attempt killed right after saving did not report."""
    reported: set[str] = set()
    offset = 0
    while True:
        batch, end = read_events(run.events_file, offset)
        if end == offset:
            break
        offset = end
        reported.update(event.data["path"] for event in batch if event.type == "checkpoint")
    for checkpoint in run.complete_checkpoints():
        if str(checkpoint) not in reported:
            report(events, checkpoint, read_manifest(checkpoint))


def read_manifest(checkpoint: Path) -> Manifest:
    with open_plain(checkpoint / COMPLETE_MARKER) as marker:
        return Manifest(**json.loads(marker.read()))


def remove_torn(run: RunDirectory) -> list[Path]:
    """Delete and return the checkpoints that are not whole: without a marker, or with files missing or cut short."""
    torn = [path for path in run.checkpoints.glob("checkpoint-*") if not _is_whole(path)]
    for path in torn:
        remove(path)
    return torn


def remove_oldest(run: RunDirectory, *, keep: int, best: int | None = None) -> list[Path]:
    """Delete all complete checkpoints but the newest ``keep`` and that of step ``best``; return those deleted."""
    oldest = [path for path in run.complete_checkpoints()[:-keep] if step_of(path) != best]
    for path in oldest:
        remove(path)
    return oldest


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: a kill half-way leaves a folder that counts as incomplete."""
    (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
    directory = os.open(checkpoint, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / COMPLETE_MARKER).is_file():
        return False
    expected = read_manifest(checkpoint).files
    present = _sizes(checkpoint)
    return all(present.get(name) == size for name, size in expected.items())


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Size in bytes of every file of a checkpoint but its marker, by name relative to it."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files if path.name != COMPLETE_MARKER
    }
