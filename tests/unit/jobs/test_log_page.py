"""Pages and tails of a log: every byte once, characters whole, rotation told."""

import pytest

from bento_service.jobs.log_page import read_page, read_tail


@pytest.fixture
def log(tmp_path):
    return tmp_path / "trainer.log"


@pytest.mark.parametrize("limit", [4, 5, 7, 64, 10_000])
def test_pages_put_together_are_the_log(log, limit):
    text = "step 1: löss 0.5 ▮▮ 😀\n" * 20
    log.write_text(text)
    found, offset = "", 0
    while True:
        page = read_page(log, offset=offset, limit=limit)
        assert len(page.content.encode()) <= limit
        if not page.content:
            break
        found, offset = found + page.content, page.next_offset
    assert found == text
    assert (offset, page.size, page.truncated) == (len(text.encode()), len(text.encode()), False)


def test_bytes_that_are_no_text_are_replaced_and_passed(log):
    log.write_bytes(b"a\xffb\xf0\x9f")
    page = read_page(log, offset=0, limit=100)
    assert (page.content, page.next_offset) == ("a\ufffdb", 3)
    rest = read_page(log, offset=3, limit=100)
    assert (rest.content, rest.next_offset) == ("\ufffd", 5)


def test_a_rotated_log_is_told(log):
    log.write_text("new\n")
    page = read_page(log, offset=100, limit=100)
    assert (page.truncated, page.offset, page.content, page.next_offset) == (True, 0, "new\n", 4)


def test_a_log_that_is_not_there_is_empty(log):
    for page in (read_page(log, offset=0, limit=100), read_tail(log, lines=3, limit=100)):
        assert (page.content, page.size, page.truncated) == ("", 0, False)


@pytest.mark.parametrize(
    ("lines", "limit", "expected"),
    [
        (1, 100, "three ü\n"),
        (2, 100, "two\nthree ü\n"),
        (9, 100, "one\ntwo\nthree ü\n"),
        (9, 5, "e ü\n"),
        (9, 2, "\n"),
    ],
)
def test_the_tail_is_bounded_by_lines_and_bytes(log, lines, limit, expected):
    log.write_text("one\ntwo\nthree ü\n")
    page = read_tail(log, lines=lines, limit=limit)
    assert page.content == expected
    assert (page.offset + len(expected.encode()), page.next_offset) == (page.size, page.size)
