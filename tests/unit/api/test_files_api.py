"""``/v1/files`` over HTTP."""

import hashlib

import pytest

from tests.core_factory import PAIRS, json_lines, request

DATA = json_lines(PAIRS)


def send(client, content=DATA, *, name="pairs.jsonl", **fields):
    return client.post("/v1/files", files={"file": (name, content)}, data=fields)


def bytes_on_disk(impl):
    return [path for path in impl.settings.files_path.rglob("*") if path.is_file()]


def test_a_file_comes_back_as_it_was_sent(client):
    content = DATA * 40 + "ünï\r\n--boundary\r\n".encode()
    sent = send(client, content, name="my päirs.jsonl", purpose="fine-tune")
    assert sent.status_code == 200
    file = sent.json()
    assert (file["object"], file["purpose"], file["bytes"]) == ("file", "fine-tune", len(content))
    assert file["filename"] == "my päirs.jsonl"
    assert client.get(f"/v1/files/{file['id']}").json() == file
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content
    assert client.get(f"/v1/files/{file['id']}/content", headers={"Range": "bytes=2-5"}).content == content[2:6]


def test_a_file_name_is_never_a_path(client, impl):
    file = send(client, name="../../../etc/passwd").json()
    stored = bytes_on_disk(impl)
    assert len(stored) == 1
    assert stored[0].name == impl.get_file(file["id"]).sha256


def test_files_are_listed_newest_first_page_by_page(client):
    ids = [send(client).json()["id"] for _ in range(3)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    assert [file["id"] for file in first["data"]] == [ids[2], ids[1]]
    assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, ids[1])
    rest = client.get("/v1/files", params={"limit": 2, "after": first["last_id"]}).json()
    assert [file["id"] for file in rest["data"]] == [ids[0]]
    assert rest["has_more"] is False
    oldest = client.get("/v1/files", params={"limit": 2, "order": "asc"}).json()
    assert ([file["id"] for file in oldest["data"]], oldest["has_more"]) == (ids[:2], True)
    newer = client.get("/v1/files", params={"order": "asc", "after": ids[1], "limit": 10_000}).json()
    assert [file["id"] for file in newer["data"]] == [ids[2]]
    assert client.get("/v1/files", params={"purpose": "vision"}).json()["data"] == []
    assert len(client.get("/v1/files", params={"purpose": "fine-tune"}).json()["data"]) == 3


def test_a_deleted_file_is_gone(client):
    file_id = send(client).json()["id"]
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file_id}").status_code == 404
    assert client.delete(f"/v1/files/{file_id}").status_code == 404


def test_a_file_in_use_is_not_deleted(client, impl):
    file_id = send(client).json()["id"]
    impl.submit(request(file_id))
    answer = client.delete(f"/v1/files/{file_id}")
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"files": {"file": ("p.jsonl", DATA)}, "data": {"purpose": "vision"}}, "'vision'"),
        ({"files": {"data": ("p.jsonl", DATA)}}, "part 'file'"),
        (
            {"files": {"file": ("p", DATA)}, "data": {"expires_after[anchor]": "created_at"}},
            "Files do not expire here",
        ),
        ({"files": {"file": ("p", DATA)}, "data": {"purpos": "fine-tune"}}, "unknown field 'purpos'"),
        ({"files": [("file", ("a", DATA)), ("file", ("b", DATA))]}, "one file at a time"),
        ({"files": {"file": ("p.jsonl", b"")}}, "empty"),
        ({"json": {"file": "x"}}, "multipart/form-data"),
        ({"content": b"no form", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "malformed"),
        (
            {
                "content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf a fi',
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            "cut off",
        ),
        ({"files": {"file": ("p.jsonl", DATA)}, "data": {"purpose": "x" * 20_000}}, "longer than"),
        ({"files": {"file": ("p", DATA)}, "data": {f"field{number}": "x" for number in range(20)}}, "parts"),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(client, impl, sent, says):
    answer = client.post("/v1/files", **sent)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert bytes_on_disk(impl) == []
    assert client.get("/v1/files").json()["data"] == []


def test_a_file_over_the_limit_is_refused_by_its_announced_length(client, impl):
    answer = send(client, b"x" * (impl.settings.max_file_bytes + 100_000))
    assert answer.status_code == 413
    assert "TRL_MAX_FILE_BYTES" in answer.json()["error"]["message"]
    assert bytes_on_disk(impl) == []


@pytest.mark.parametrize("over", [1, 100_000])
def test_a_file_over_the_limit_is_refused_while_it_arrives(client, impl, over):
    """Without a Content-Length: just over the file's limit, and over that of the whole body."""

    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(10):
            yield b"x" * (impl.settings.max_file_bytes // 10)
        yield b"x" * over
        yield b"\r\n--x--\r\n"

    answer = client.post("/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert bytes_on_disk(impl) == []


@pytest.mark.parametrize("file_id", ["absent", "a" * 65, "a%20b", "..%5cetc", "%00"])
def test_an_id_that_cannot_exist_is_not_found(client, file_id):
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"


def test_a_file_is_found_by_its_content(client):
    file = send(client).json()
    send(client, DATA * 2)
    digest = hashlib.sha256(DATA).hexdigest()
    assert file["trl"]["sha256"] == digest
    assert [f["id"] for f in client.get("/v1/files", params={"sha256": digest}).json()["data"]] == [file["id"]]
    assert client.get("/v1/files", params={"sha256": "0" * 64}).json()["data"] == []
    assert client.get("/v1/files", params={"sha256": "../x"}).status_code == 400
