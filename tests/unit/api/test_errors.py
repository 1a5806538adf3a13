"""Answers to what goes wrong, and what the OpenAPI document says of them."""

import asyncio

import httpx
import pytest

from bento_service import errors
from bento_service.api.bento_errors import BentoErrors
from bento_service.api.errors import status_of
from bento_service.post_training import TrlPostTrainingImpl


def test_an_unexpected_failure_says_nothing_but_where_its_cause_is(client, monkeypatch, capsys):
    def crash(self, job_id):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(TrlPostTrainingImpl, "status", crash)
    answer = client.get("/v1/fine_tuning/jobs/ftjob-1", headers={"x-request-id": "seen-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "seen-1"
    logged = capsys.readouterr()
    assert "secret detail" in logged.out + logged.err


def test_health_is_503_while_the_database_is_away(client, impl, monkeypatch):
    def away():
        raise errors.Overloaded("The database does not answer.")

    monkeypatch.setattr(impl, "count_jobs", away)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")


def test_health(client):
    answer = client.get("/health")
    assert answer.status_code == 200
    health = answer.json()
    assert (health["status"], health["service"], health["device"]) == ("healthy", "trl-training-service", "cpu")
    assert health["queue"]["queued"] == 0


def test_unknown_routes_and_methods_are_answered_in_the_same_shape(client):
    unknown = client.get("/v1/fine_tuning/models")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    for method in ("PUT", "OPTIONS", "BREW"):
        unsupported = client.request(method, "/v1/files")
        assert (unsupported.status_code, unsupported.json()["error"]["code"]) == (405, "method_not_allowed")
        assert unsupported.headers["allow"] == "GET, HEAD, POST"


async def bento(status, headers, *pieces):
    """What is answered for an answer of BentoML's of these pieces."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces, start=1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    transport = httpx.ASGITransport(BentoErrors(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get("/train_dpo")


@pytest.mark.parametrize(
    ("status", "body", "says", "param"),
    [
        (404, b"Not Found", "There is no GET /train_dpo", None),
        (405, b"Method Not Allowed", "only POST", None),
        (404, b'[{"error": "No fine-tuning job x."}]', "No fine-tuning job x.", None),
        (
            400,
            b'{"error": "1 error", "detail": [{"type": "missing", "loc": ["trl", "a"], "msg": "Field required"}]}',
            "trl.a: Field required",
            "trl.a",
        ),
        (400, b'{"error": "1", "detail": [{"type": "json_invalid", "loc": [], "msg": "Invalid JSON"}]}', "JSON", None),
        (503, b"", "The service answered 503", None),
        (500, b"out of order", "out of order", None),
    ],
)
def test_errors_of_bentos_own_routes_have_the_same_shape(status, body, says, param):
    headers = [(b"allow", b"POST"), (b"content-length", str(len(body)).encode()), (b"content-type", b"text/plain")]
    answer = asyncio.run(bento(status, headers, body[:5], body[5:]))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], answer.headers["allow"]) == (status, param, "POST")
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_is_no_error_of_bentos_stays_as_it_is():
    assert asyncio.run(bento(200, [], b"one ", b"two")).text == "one two"
    ours = b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'
    assert asyncio.run(bento(409, [(b"x-should-retry", b"false")], ours)).content == ours


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidDataset("x"), 400),
        (errors.TooLarge("x"), 413),
        (errors.NotFound("x"), 404),
        (errors.ClientIdConflict("x"), 409),
        (errors.Forbidden("x"), 403),
        (errors.Overloaded("x"), 503),
        (errors.TrlRemoteError("x"), 500),
    ],
)
def test_status_of_each_kind_of_error(error, status):
    assert status_of(error) == status


def test_the_document_describes_every_route_and_its_errors(client):
    document = client.get("/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] and "422" not in operation["responses"] for operation in operations)
    for path, answers in document["paths"].items():
        for operation in answers.values():
            if path.startswith("/v1"):
                body = operation["responses"]["401"]["content"]["application/json"]["schema"]["$ref"]
                assert body.endswith("/ErrorBody")
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    for name in ("CreateJob", "TrlOptions", "LoraOptions", "DpoHyperparameters-Input"):
        assert schemas[name]["additionalProperties"] is False
    beta = schemas["DpoHyperparameters-Input"]["properties"]["beta"]
    assert {"type": "string", "const": "auto"} in beta["anyOf"]
    assert "0.1" in beta["description"]
