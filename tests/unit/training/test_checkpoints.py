"""Checkpoint folders: whole, torn, old."""

import hashlib
import json
from pathlib import Path

import pytest

from bento_service.training import checkpoints
from bento_service.training.events import EventWriter, read_events
from bento_service.training.run_directory import COMPLETE_MARKER, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def save(run: RunDirectory, step: int, *, complete: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 100)
    (folder / "training_args.bin").write_bytes(b"pickle")
    if complete:
        checkpoints.complete(folder, step=step, epoch=step / 10, tokens=step * 50, final=step == 10)
    return folder


def test_a_complete_checkpoint_says_what_it_holds(run: RunDirectory) -> None:
    folder = save(run, 10)
    (folder / "optimizer.pt").write_bytes(b"o" * 10)
    checkpoints.complete(folder, step=10, epoch=1.0, tokens=500, final=True, about={"job_id": "ftjob-1"})
    digest = hashlib.sha256(b"w" * 100).hexdigest()
    text = (folder / "manifest.json").read_bytes()
    contents = json.loads(text)
    assert contents == {
        "job_id": "ftjob-1",
        "checkpoint": {
            "step": 10,
            "epoch": 1.0,
            "tokens": 500,
            "final": True,
            "files": [{"name": "adapter_model.safetensors", "bytes": 100, "sha256": digest}],
        },
    }
    manifest = checkpoints.read_manifest(folder)
    assert manifest == checkpoints.Manifest(
        step=10,
        epoch=1.0,
        tokens=500,
        final=True,
        files={"adapter_model.safetensors": 100, "manifest.json": len(text), "optimizer.pt": 10},
        sha256={"adapter_model.safetensors": digest, "manifest.json": hashlib.sha256(text).hexdigest()},
    )
    assert manifest.bytes == 110 + len(text)
    assert manifest.published == {"adapter_model.safetensors": 100, "manifest.json": len(text)}
    assert not (folder / "training_args.bin").exists()


def test_an_adapter_names_its_base_model_as_the_user_did(run: RunDirectory) -> None:
    folder = save(run, 1)
    config = folder / "adapter_config.json"
    config.write_text('{"r": 8, "base_model_name_or_path": "/models/org/tiny"}')
    checkpoints.name_base_model(folder, "org/tiny")
    assert json.loads(config.read_text()) == {"r": 8, "base_model_name_or_path": "org/tiny"}


def test_torn_checkpoints_are_removed_and_whole_ones_kept(run: RunDirectory) -> None:
    whole = save(run, 1)
    cut = save(run, 2)
    (cut / "adapter_model.safetensors").write_bytes(b"w")
    lacking = save(run, 3)
    (lacking / "adapter_model.safetensors").unlink()
    unmarked = save(run, 4, complete=False)
    assert set(checkpoints.remove_torn(run)) == {cut, lacking, unmarked}
    assert list(run.checkpoints.iterdir()) == [whole]


def test_nothing_is_torn_before_the_first_attempt(run: RunDirectory) -> None:
    assert checkpoints.remove_torn(run) == []


def test_only_the_newest_are_kept_by_step_not_by_name(run: RunDirectory) -> None:
    folders = {step: save(run, step) for step in (9, 10, 100)}
    assert checkpoints.remove_oldest(run, keep=2) == [folders[9]]
    assert run.complete_checkpoints() == [folders[10], folders[100]]
    assert checkpoints.remove_oldest(run, keep=2) == []


def test_removal_takes_the_marker_first(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(run, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(folder)
    assert folder.is_dir()
    assert not (folder / COMPLETE_MARKER).exists()


def test_a_checkpoint_saved_right_before_a_kill_is_reported_by_the_next_attempt(run: RunDirectory) -> None:
    first, second = save(run, 5), save(run, 10)
    events = EventWriter(run.events_file)
    checkpoints.report(events, first, checkpoints.read_manifest(first))
    checkpoints.report_missed(events, run)
    checkpoints.report_missed(events, run)
    written, _ = read_events(run.events_file)
    assert [(event.data["step"], event.data["path"], event.data["final"]) for event in written] == [
        (5, str(first), False),
        (10, str(second), True),
    ]
