"""The guard: who is answered, and who is told what to do instead."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from bento_service.api.access import OPEN_PATHS
from bento_service.api.app import in_front_of
from bento_service.settings import Settings

LOCAL = ("127.0.0.1", 50000)
REMOTE = ("192.0.2.7", 50000)


def answer(path="/v1/files", *, client=LOCAL, base_url="http://localhost:8080", headers=None, **settings):
    everything = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("served"))])
    app = in_front_of(everything, Settings(**settings))
    return TestClient(app, base_url=base_url, client=client).get(path, headers=headers)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1:8080", "[::1]:8080", "trl.localhost"])
def test_without_keys_callers_on_this_host_are_answered(address, host):
    assert answer(client=(address, 1), base_url=f"http://{host}").text == "served"


@pytest.mark.parametrize("address", ["192.0.2.7", "10.0.0.1", "::ffff:192.0.2.7", "2001:db8::1"])
def test_without_keys_other_hosts_are_told_what_to_set(address):
    refused = answer(client=(address, 1))
    assert refused.status_code == 403
    message = refused.json()["error"]["message"]
    assert "TRL_API_KEYS" in message
    assert "TRL_ALLOW_ANONYMOUS" in message


def test_anonymous_callers_are_answered_where_the_operator_says_so():
    assert answer(client=REMOTE, base_url="http://trainer.example", allow_anonymous=True).text == "served"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "rebound.example"}, "foreign_host"),
        ({"host": "127.0.0.1.example"}, "foreign_host"),
        ({"host": "[::1"}, "foreign_host"),
        ({"origin": "https://site.example"}, "foreign_origin"),
        ({"origin": "null"}, "foreign_origin"),
    ],
)
def test_web_pages_of_other_sites_are_refused(headers, code):
    refused = answer(headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)


def test_a_page_of_this_host_is_answered():
    assert answer(headers={"origin": "http://localhost:8080"}).text == "served"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer second"},
        {"authorization": "bearer second"},
        {"x-api-key": "first"},
        {"x-api-key": "first", "authorization": "Bearer the-gateway's"},
    ],
)
@pytest.mark.parametrize("client", [LOCAL, REMOTE])
def test_a_caller_with_a_key_is_answered_from_anywhere(headers, client):
    assert answer(headers=headers, client=client, api_keys="first, second").text == "served"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Basic second"}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Bearer secon"}, "invalid_api_key"),
        ({"x-api-key": "first,second"}, "invalid_api_key"),
        ({"x-api-key": b"\xff\xfe"}, "invalid_api_key"),
    ],
)
def test_with_keys_nobody_is_answered_without_one_not_even_on_this_host(headers, code):
    refused = answer(headers=headers, api_keys="first,second")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, code)
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "second" not in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
@pytest.mark.parametrize("settings", [{}, {"api_keys": "first"}])
def test_probes_are_open(path, settings):
    assert answer(path, client=REMOTE, base_url="http://10.0.0.5", **settings).text == "served"


@pytest.mark.parametrize("path", ["/health/", "/readyz/../v1/files", "/schema.json", "/train_dpo", "/docs"])
def test_nothing_else_is_open(path):
    assert answer(path, client=REMOTE).status_code == 403


@pytest.mark.parametrize("kind", ["application/vnd.bentoml+pickle", "Application/X-Pickle; v=5"])
def test_pickles_are_refused_even_with_a_key(kind):
    refused = answer(headers={"content-type": kind, "x-api-key": "first"}, api_keys="first")
    assert refused.status_code == 415


def test_web_sockets_are_closed_at_once():
    app = in_front_of(Starlette(), Settings())
    with (
        pytest.raises(WebSocketDisconnect),
        TestClient(app, base_url="http://localhost", client=LOCAL).websocket_connect("/v1/files"),
    ):
        pass


def test_every_answer_has_a_request_id():
    assert answer().headers["x-request-id"].startswith("req_")
    assert answer(client=REMOTE).headers["x-request-id"].startswith("req_")
    assert answer(headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert answer(headers={"x-request-id": "not\tone"}).headers["x-request-id"].startswith("req_")
