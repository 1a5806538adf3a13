"""Checkpoint folders of one run: completing, checking, keeping the newest, clearing away what a kill left."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from bento_service.training.events import EventWriter, read_events
from bento_service.training.run_directory import COMPLETE_MARKER, RunDirectory, mark_complete

# A pickle of TRL's arguments, which nothing here reads; model folders are handed to others without pickled objects.
UNWANTED = "training_args.bin"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the marker of a complete checkpoint says."""

    step: int
    epoch: float
    tokens: int  # trained by then, padding not counted
    final: bool  # of the last step
    files: dict[str, int]  # name inside the checkpoint -> bytes

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def complete(checkpoint: Path, *, step: int, epoch: float, tokens: int, final: bool) -> Manifest:
    """Mark a checkpoint whose files are all written as complete: the marker is written last, after a flush."""
    (checkpoint / UNWANTED).unlink(missing_ok=True)
    manifest = Manifest(step=step, epoch=epoch, tokens=tokens, final=final, files=_sizes(checkpoint))
    mark_complete(checkpoint, asdict(manifest))
    return manifest


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
    return Manifest(**json.loads((checkpoint / COMPLETE_MARKER).read_bytes()))


def remove_torn(run: RunDirectory) -> list[Path]:
    """Delete and return the checkpoints that are not whole: without a marker, or with files missing or cut short."""
    torn = [path for path in run.checkpoints.glob("checkpoint-*") if not _is_whole(path)]
    for path in torn:
        remove(path)
    return torn


def remove_oldest(run: RunDirectory, *, keep: int) -> list[Path]:
    """Delete all complete checkpoints but the newest ``keep``; return those deleted, oldest first."""
    oldest = run.complete_checkpoints()[:-keep]
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
