"""Uploaded bytes: stored once, named by their digest, and nothing left of what fails."""

import hashlib

import pytest

from bento_service.errors import NotFound, TooLarge
from bento_service.files import FileStorage


@pytest.fixture
def storage(tmp_path):
    return FileStorage(tmp_path / "files", max_bytes=10)


def everything_in(storage):
    return [path for path in storage.root.rglob("*") if path.is_file()]


def test_bytes_lie_under_their_digest(storage):
    with storage.receive() as incoming:
        incoming.write(b"hello")
        incoming.write(b" you")
        stored = incoming.commit()
    digest = hashlib.sha256(b"hello you").hexdigest()
    assert (stored.sha256, stored.bytes) == (digest, 9)
    assert storage.existing_path(digest) == storage.root / digest[:2] / digest
    assert storage.existing_path(digest).read_bytes() == b"hello you"


def test_the_same_bytes_are_stored_once(storage):
    for _ in range(2):
        with storage.receive() as incoming:
            incoming.write(b"same")
            incoming.commit()
    assert len(everything_in(storage)) == 1


def test_a_file_over_the_limit_is_refused_while_it_arrives_and_leaves_nothing(storage):
    with pytest.raises(TooLarge, match="10 bytes"), storage.receive() as incoming:
        incoming.write(b"x" * 10)
        incoming.write(b"x")
    assert everything_in(storage) == []


def test_an_upload_that_breaks_off_leaves_nothing(storage):
    with pytest.raises(ConnectionError), storage.receive() as incoming:
        incoming.write(b"half")
        raise ConnectionError
    assert everything_in(storage) == []


def test_deleted_bytes_are_not_found(storage):
    with storage.receive() as incoming:
        incoming.write(b"gone")
        stored = incoming.commit()
    storage.delete(stored.sha256)
    storage.delete(stored.sha256)
    with pytest.raises(NotFound, match=stored.sha256):
        storage.existing_path(stored.sha256)


def test_what_a_dead_process_left_half_written_is_removed_but_files_stay(storage):
    with storage.receive() as incoming:
        incoming.write(b"kept")
        kept = incoming.commit()
    (storage.incoming / "upload-abandoned").write_bytes(b"half")
    storage.remove_abandoned()
    assert everything_in(storage) == [storage.path_of(kept.sha256)]
