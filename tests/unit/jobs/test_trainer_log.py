"""A trainer's log stays small, and its newest lines are kept."""

from bento_service.jobs.trainer_log import rotate


def test_a_large_log_is_moved_aside_while_it_is_written(tmp_path):
    log = tmp_path / "trainer.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        assert not rotate(log, 100)
        writer.write(b"b" * 50)
        assert rotate(log, 100)
        writer.write(b"c" * 10)
    assert log.read_bytes() == b"c" * 10
    assert (tmp_path / "trainer.log.1").read_bytes() == b"a" * 50 + b"b" * 50


def test_no_log_is_no_error(tmp_path):
    assert not rotate(tmp_path / "trainer.log", 10)
