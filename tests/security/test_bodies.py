"""What bodies are taken in: of which size, how fast, how deep.

The application is called as a server calls it, so that a test decides when which piece of a body arrives.
"""

import asyncio
import json
import time

import pytest

from bento_service.api.app import create_app, in_front_of
from bento_service.api.request import MAX_JSON_BYTES, MAX_JSON_DEPTH
from tests.core_factory import PAIRS, core, json_lines

FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
UPLOAD = ("/v1/files", "multipart/form-data; boundary=x")
SUBMIT = ("/v1/fine_tuning/jobs", "application/json")
NEVER = object()
GONE = object()


@pytest.fixture
def call(tmp_path):
    """Send the pieces of a body, some after a pause; the answer's status, headers and error."""

    def run(to, *pieces, declared=None, **settings):
        with core(tmp_path, **settings) as impl:
            answer = asyncio.run(_send(in_front_of(create_app(impl), impl.settings), to, pieces, declared))
            # However it ended, of the upload there is all or nothing.
            assert list((impl.settings.files_path / "incoming").iterdir()) == []
            return answer

    return run


async def _send(app, to, pieces, declared):
    path, kind = to
    length = (b"transfer-encoding", b"chunked") if declared is None else (b"content-length", str(declared).encode())
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", kind.encode()), length],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    left, sent = list(pieces), []

    async def receive():
        if left and left[0] is NEVER:
            await asyncio.Event().wait()
        piece = left.pop(0) if left else GONE
        if isinstance(piece, tuple):
            seconds, piece = piece
            await asyncio.sleep(seconds)
        if piece is GONE:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return None
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(body).get("error")


class TestSlowBodies:
    """A body of which nothing arrives for TRL_BODY_IDLE_SECONDS, or too little, is given up with 408."""

    @pytest.mark.parametrize(("to", "start"), [(SUBMIT, b'{"model": '), (UPLOAD, FORM), (("/job_status", "x"), b"{")])
    def test_nothing_arrives(self, call, to, start):
        status, headers, error = call(to, start, NEVER, body_idle_seconds=0.1)
        assert (status, error["code"]) == (408, "body_too_slow")
        assert "TRL_BODY_IDLE_SECONDS" in error["message"]
        # What still comes would be read as another request.
        assert headers[b"connection"] == b"close"

    @pytest.mark.parametrize(("to", "start"), [(SUBMIT, b'{"model": "'), (UPLOAD, FORM)])
    def test_too_little_arrives(self, call, to, start):
        pieces = [(0.02, b"x")] * 500
        began = time.monotonic()
        status, _, error = call(to, start, *pieces, body_idle_seconds=0.2, body_bytes_per_second=1000)
        assert (status, error["code"]) == (408, "body_too_slow")
        assert time.monotonic() - began < 8

    def test_a_slow_line_is_enough(self, call):
        rows = json_lines(PAIRS)
        pieces = [(0.005, rows[start : start + 20]) for start in range(0, len(rows), 20)]
        settings = {"body_idle_seconds": 0.05, "body_bytes_per_second": 10}
        assert call(UPLOAD, FORM, *pieces, b"\r\n--x--\r\n", **settings)[0] == 200

    def test_a_caller_who_leaves_is_nothing_to_report(self, call, capsys):
        for to, start in ((UPLOAD, FORM + b"half a"), (SUBMIT, b'{"model"')):
            assert call(to, start, GONE) is None
        logged = capsys.readouterr()
        assert "Traceback" not in logged.out + logged.err


class TestLargeBodies:
    """A JSON body has a megabyte at most, told by its announced length or as soon as it is passed."""

    def test_announced(self, call):
        status, _, error = call(SUBMIT, NEVER, declared=MAX_JSON_BYTES + 1)
        assert (status, error["code"]) == (413, "too_large")

    def test_while_it_arrives(self, call):
        status, headers, error = call(SUBMIT, *[b" " * 100_000] * 11, NEVER)
        assert (status, error["code"], headers[b"connection"]) == (413, "too_large", b"close")


class TestOddJson:
    """A body is nested at most 32 levels deep and holds no NUL character, wherever it is read."""

    @pytest.mark.parametrize("to", [SUBMIT, ("/v1/files/import", "application/json"), ("/train_dpo", "x/y")])
    @pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
    def test_deep(self, call, to, opening):
        began = time.process_time()
        status, _, error = call(to, (opening * 150_000).encode())
        assert (status, error["code"]) == (400, "invalid_request")
        assert "nested" in error["message"]
        assert time.process_time() - began < 10

    def test_wide_is_not_deep(self, call):
        brackets = {"metadata": {"k": "[{" * 100 + '\\"' + "[" * 100}, "trl": [[{}]] * 1000}
        assert "nested" not in call(SUBMIT, json.dumps(brackets).encode())[2]["message"]
        nested = "[" * (MAX_JSON_DEPTH - 1) + "]" * (MAX_JSON_DEPTH - 1)
        assert "nested" not in call(SUBMIT, f'{{"metadata": {nested}}}'.encode())[2]["message"]

    @pytest.mark.parametrize("text", ['{"model": "a\\u0000b"}', '{"a\\u0000": 1}', '["\\\\\\u0000"]'])
    def test_nul(self, call, text):
        status, _, error = call(SUBMIT, text.encode())
        assert status == 400
        assert "NUL" in error["message"]

    def test_a_backslash_and_some_digits_are_no_nul(self, call):
        assert "NUL" not in call(SUBMIT, rb'{"model": "a\\u0000b"}')[2]["message"]


def test_nul_in_a_query(client):
    """Nor does a query hold one."""
    for query in ("client_id=a%00b", "metadata[k]=%00", "after=%00"):
        answer = client.get(f"/v1/fine_tuning/jobs?{query}")
        assert answer.status_code == 400
        assert "NUL" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/vnd.bentoml+pickle", "application/x-pickle", "Application/Pickle; v=5"])
@pytest.mark.parametrize("path", ["/v1/files", "/v1/fine_tuning/jobs", "/train_dpo", "/job_status"])
def test_pickles_are_refused_on_every_route(client, path, kind):
    """Unpickling runs code, so no pickle is read, BentoML's own form of it included."""
    answer = client.post(path, content=b"\x80\x05N.", headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "pickle_refused")
