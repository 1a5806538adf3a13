"""The tar of a checkpoint: what is in it, and that any part of it can be had."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bento_service.checkpoint_archive import CheckpointArchive, open_checkpoint
from bento_service.errors import NotFound, NotReady, UnreadableRun
from bento_service.training import checkpoints
from bento_service.training.run_directory import COMPLETE_MARKER, RunDirectory

PUBLISHED = {"adapter_model.safetensors": b"w" * 1500, "tokenizer.json": b"{}", "empty.txt": b"", "block": b"x" * 512}
PRIVATE = {"optimizer.pt": b"o", "scheduler.pt": b"s", "rng_state.pth": b"r", "trainer_state.json": b"{}"}


def save(run: RunDirectory, step: int = 3, *, complete: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, content in (PUBLISHED | PRIVATE).items():
        (folder / name).write_bytes(content)
    if complete:
        checkpoints.complete(folder, step=step, epoch=1.0, tokens=9, final=True, about={"job_id": "ftjob-1"})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "ftjob-1")


def archive_of(run: RunDirectory) -> CheckpointArchive:
    return open_checkpoint(run, "ftjob-1", 3, ended=False)


def test_it_holds_the_published_files_and_their_digests(run: RunDirectory) -> None:
    folder = save(run)
    archive = archive_of(run)
    content = b"".join(archive.read())
    assert len(content) == archive.size
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        held = {member.name: tar.extractfile(member).read() for member in tar}
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
    assert list(held) == sorted(held)
    manifest = (folder / "manifest.json").read_bytes()
    expected = PUBLISHED | {"manifest.json": manifest}
    assert held == {f"checkpoint-3/{name}": content for name, content in expected.items()}
    for member in archive.members:
        assert member.sha256 == checkpoints.sha256_of(member.path)


def test_the_same_files_are_the_same_bytes_on_any_host(run: RunDirectory, tmp_path: Path) -> None:
    save(run)
    other = RunDirectory(tmp_path / "elsewhere" / "ftjob-1")
    for file in save(other).iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    assert b"".join(archive_of(run).read()) == b"".join(archive_of(other).read())
    assert archive_of(run).etag == archive_of(other).etag


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> CheckpointArchive:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    save(run)
    return archive_of(run)


@given(data=st.data())
def test_any_part_of_it_is_that_part_of_the_whole(whole: CheckpointArchive, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    assert b"".join(whole.read(start, stop)) == b"".join(whole.read())[start:stop]


def test_long_names_keep_the_length_right(run: RunDirectory) -> None:
    folder = save(run, complete=False)
    (folder / ("n" * 150)).write_bytes(b"long")
    checkpoints.complete(folder, step=3, epoch=1.0, tokens=9, final=True)
    archive = archive_of(run)
    content = b"".join(archive.read())
    assert len(content) == archive.size
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert f"checkpoint-3/{'n' * 150}" in tar.getnames()


def test_another_content_has_another_etag(run: RunDirectory) -> None:
    folder = save(run)
    before = archive_of(run).etag
    (folder / COMPLETE_MARKER).unlink()
    (folder / "tokenizer.json").write_bytes(b"[]")
    checkpoints.complete(folder, step=3, epoch=1.0, tokens=9, final=True)
    assert archive_of(run).etag != before


def test_a_checkpoint_of_an_older_version_has_no_digests_and_is_handed_out(run: RunDirectory) -> None:
    folder = save(run, complete=False)
    (folder / COMPLETE_MARKER).write_text(
        '{"step": 3, "epoch": 1.0, "tokens": 9, "final": true, "files": {"tokenizer.json": 2, "optimizer.pt": 1}}'
    )
    archive = archive_of(run)
    assert [(member.name, member.sha256) for member in archive.members] == [("tokenizer.json", None)]
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive.read()))) as tar:
        assert tar.getnames() == ["checkpoint-3/tokenizer.json"]


def test_what_is_being_written_is_told_from_what_never_will_be(run: RunDirectory) -> None:
    save(run, complete=False)
    with pytest.raises(NotReady, match="still being written"):
        open_checkpoint(run, "ftjob-1", 3, ended=False)
    with pytest.raises(NotFound, match="not saved to the end"):
        open_checkpoint(run, "ftjob-1", 3, ended=True)
    with pytest.raises(NotFound, match="no checkpoint of step 4"):
        open_checkpoint(run, "ftjob-1", 4, ended=False)


def test_single_files_only_by_a_name_in_the_manifest(run: RunDirectory) -> None:
    save(run)
    assert archive_of(run).member("tokenizer.json").size == 2
    for name in ("optimizer.pt", COMPLETE_MARKER, "../../spec.json", "/etc/passwd", "./tokenizer.json", ""):
        with pytest.raises(NotFound):
            archive_of(run).member(name)


def test_links_are_not_followed(run: RunDirectory, tmp_path: Path) -> None:
    folder = save(run)
    secret = tmp_path / "secret"
    secret.write_bytes(b"{}")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UnreadableRun, match="leads out of the checkpoint"):
        list(archive_of(run).read())
    # Inside the folder it leads nowhere else, and is still no file that was saved.
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "scheduler.pt")
    with pytest.raises(UnreadableRun, match=r"tokenizer\.json"):
        list(archive_of(run).read())


def test_a_checkpoint_folder_that_is_a_link_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "other")
    save(other)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "checkpoint-3").symlink_to(other.checkpoints / "checkpoint-3")
    with pytest.raises(UnreadableRun, match="link"):
        archive_of(run)


def test_a_file_that_changed_is_not_handed_out(run: RunDirectory) -> None:
    folder = save(run)
    (folder / "tokenizer.json").write_bytes(b"longer than it was")
    with pytest.raises(UnreadableRun, match=r"tokenizer\.json"):
        list(archive_of(run).read())
    with pytest.raises(UnreadableRun, match=r"tokenizer\.json"):
        archive_of(run).member("tokenizer.json")
