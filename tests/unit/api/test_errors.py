"""Answers to what goes wrong, and what the OpenAPI document says of them."""

import pytest

from bento_service import errors
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
    unsupported = client.put("/v1/files")
    assert (unsupported.status_code, unsupported.json()["error"]["code"]) == (405, "method_not_allowed")


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
