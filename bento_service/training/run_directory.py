"""One job's folder: specification in, events, log, checkpoints and outcome out.

TRL_HOME/runs/<job id>/
  spec.json          TrainingSpec, written before the job can be claimed
  events.jsonl       appended by the trainer, one JSON object a line (see ``events``)
  lease              touched by the supervisor (see ``lease``)
  trainer.log        stdout and stderr of all attempts
  checkpoints/checkpoint-<step>/   complete only when it holds ``COMPLETE_MARKER``
  cache/             tokenized data of the attempt under way; not there afterwards
  reserve            takes up the room that reporting a full disk needs
  manifest.json      what was trained with what on what, and how well; written when the run has succeeded
  ranks/             of a job on several devices: how each process of the attempt under way ended (see ``ranks``)
  outcome.json       how the last attempt ended, written by the trainer as its last act
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bento_service.errors import UnreadableRun
from bento_service.training.spec import TrainingSpec

COMPLETE_MARKER = "complete.json"

# Room for a traceback, an event and an outcome, with the file system's own blocks.
_RESERVE_BYTES = 256 * 1024


class Outcome(BaseModel):
    """How an attempt ended, in the trainer's own words. A trainer that was killed leaves none."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    status: Literal["succeeded", "failed", "stopped"]  # stopped: on request, with a checkpoint to continue from
    code: str | None = None  # error code when failed
    message: str | None = None
    param: str | None = None
    retryable: bool = False


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run and the only writer of its small files."""

    path: Path

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "trainer.log"

    @property
    def lease_file(self) -> Path:
        return self.path / "lease"

    @property
    def reserve_file(self) -> Path:
        return self.path / "reserve"

    @property
    def outcome_file(self) -> Path:
        return self.path / "outcome.json"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def rank_outcomes(self) -> Path:
        return self.path / "ranks"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    def write_spec(self, spec: TrainingSpec) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_durably(self.spec_file, spec.model_dump_json(indent=2))

    def read_spec(self) -> TrainingSpec:
        return TrainingSpec.model_validate_json(self.spec_file.read_bytes())

    def write_outcome(self, outcome: Outcome) -> None:
        write_durably(self.outcome_file, outcome.model_dump_json(indent=2))

    def read_outcome(self, attempt: int) -> Outcome | None:
        """The outcome that this attempt wrote; None when it wrote none (an earlier attempt's does not count).

        Raises UnreadableRun.
        """
        if not self.outcome_file.exists():
            return None
        try:
            outcome = Outcome.model_validate_json(self.outcome_file.read_bytes())
        except ValueError as error:
            raise UnreadableRun(f"{self.outcome_file} cannot be read: {error}") from error
        return outcome if outcome.attempt == attempt else None

    def reserve_room(self) -> None:
        """Take some disk while there is some, so that a full disk can still be reported."""
        self.reserve_file.write_bytes(bytes(_RESERVE_BYTES))

    def release_room(self) -> None:
        self.reserve_file.unlink(missing_ok=True)

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of the trainer's log, at most 64 KiB of it."""
        if not self.log_file.exists():
            return []
        with self.log_file.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 65536))
            return log.read().decode("utf-8", "replace").splitlines()[-lines:]

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints that were written to the end, oldest first."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if (p / COMPLETE_MARKER).is_file()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def mark_complete(checkpoint: Path, manifest: dict[str, object]) -> None:
    """Flush every file of a checkpoint to disk, then write its marker: the marker's presence means all is there."""
    follow_umask(checkpoint)
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_folder(checkpoint.parent)
    write_durably(checkpoint / COMPLETE_MARKER, json.dumps(manifest, indent=2))


def follow_umask(folder: Path) -> None:
    """Give files the permissions that the umask says: safetensors writes its own for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def write_durably(path: Path, text: str) -> None:
    """Replace a file so that after a crash it holds either the old or the new text, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
