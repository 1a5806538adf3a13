"""Who is answered, and who is told what to do instead."""

import hmac

import pytest
import structlog
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from bento_service.api.access import OPEN_PATHS
from bento_service.api.app import create_app, in_front_of
from bento_service.settings import Settings
from tests.core_factory import core

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


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_with_keys_the_documentation_is_open_and_says_how_to_send_one(path, client):
    """A browser cannot be told to send a key with a page; the document holds nothing of this service's own."""
    assert answer(path, client=REMOTE, base_url="http://trl.example", api_keys="ci:first").text == "served"
    assert answer(path, client=REMOTE).status_code == 403  # without keys, other hosts are not answered at all
    assert answer(f"{path}/x", api_keys="ci:first").status_code == 401
    schemes = client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("name", scheme.get("scheme"))) for scheme in schemes.values()} == {
        ("http", "bearer"),
        ("apiKey", "X-API-Key"),
    }


def test_the_document_of_a_service_with_secrets_holds_none(tmp_path):
    with core(tmp_path, api_keys="ci:kept-secret", database_url=f"sqlite:///{tmp_path}/hidden.db") as impl:
        text = TestClient(create_app(impl), base_url="http://localhost").get("/openapi.json").text
    assert "kept-secret" not in text and "hidden" not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("key", "name"),
    [("first", "ci"), ("newer", "ci"), ("second", "anna"), ("third", "key-4"), ("ci", None), ("", None)],
)
def test_a_caller_is_known_by_the_name_of_its_key(key, name):
    """The name is the caller's for the routes and on every log line; it is not itself a key."""

    def tell(request):
        return JSONResponse([request.state.caller, structlog.contextvars.get_contextvars().get("caller")])

    settings = Settings(api_keys="ci:first,ci:newer,anna:second,third")
    app = in_front_of(Starlette(routes=[Route("/", tell)]), settings)
    told = TestClient(app, base_url="http://localhost", client=REMOTE).get("/", headers={"x-api-key": key})
    assert told.status_code == (401 if name is None else 200)
    assert name is None or told.json() == [name, name]


def test_every_key_is_compared_whichever_it_is(monkeypatch):
    """With compare_digest, so that the time it takes says nothing about the keys."""
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: compared.append(one) or compare(one, other))
    for key in ("first", "second", "third", "none"):
        compared.clear()
        answer(headers={"x-api-key": key}, api_keys="first,second,third")
        assert len(compared) == 3
        assert key.encode() not in compared  # digests: of one length, whatever is sent


@pytest.mark.parametrize("spelling", ["?api_key=first", "?key=first", "?access_token=first"])
def test_a_key_in_the_url_is_none(spelling):
    """URLs are written to logs and histories."""
    assert answer(f"/v1/files{spelling}", api_keys="first").status_code == 401


def test_a_refusal_and_its_log_line_do_not_repeat_the_key(capsys):
    refused = answer(headers={"authorization": "Bearer wrong-but-private"}, api_keys="first")
    logged = capsys.readouterr()
    assert "access.refused" in logged.out + logged.err
    assert "wrong-but-private" not in refused.text + str(refused.headers) + logged.out + logged.err


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key, content-type"}


class TestCors:
    """Web pages may use the API when TRL_CORS_ORIGINS names their origin; by default none may."""

    def ask(self, origin, method="GET", headers=None, **settings):
        everything = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("served"))])
        caller = TestClient(in_front_of(everything, Settings(**settings)), base_url="http://localhost", client=LOCAL)
        return caller.request(method, "/v1/files", headers={"origin": origin} | (headers or {}))

    def test_off_by_default(self):
        asked = self.ask("https://app.example", "OPTIONS", PREFLIGHT, api_keys="first")
        assert asked.status_code == 401
        assert "access-control-allow-origin" not in asked.headers
        served = self.ask("https://app.example", headers={"x-api-key": "first"}, api_keys="first")
        assert "access-control-allow-origin" not in served.headers

    def test_an_allowed_origin(self):
        settings = {"api_keys": "first", "cors_origins": "https://app.example, http://localhost:3000"}
        asked = self.ask("https://app.example", "OPTIONS", PREFLIGHT, **settings)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert "x-api-key" in asked.headers["access-control-allow-headers"]
        served = self.ask("https://app.example", headers={"x-api-key": "first"}, **settings)
        assert (served.text, served.headers["access-control-allow-origin"]) == ("served", "https://app.example")
        # The page can read why it is refused; the key is still needed.
        refused = self.ask("https://app.example", **settings)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")

    @pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.evil.example", "null"])
    def test_another_origin(self, origin):
        settings = {"api_keys": "first", "cors_origins": "https://app.example"}
        assert self.ask(origin, "OPTIONS", PREFLIGHT, **settings).status_code == 400
        served = self.ask(origin, headers={"x-api-key": "first"}, **settings)
        assert "access-control-allow-origin" not in served.headers

    def test_without_keys_an_allowed_origin_is_answered_on_this_host(self):
        assert self.ask("https://app.example", cors_origins="https://app.example").text == "served"
        refused = self.ask("https://evil.example", cors_origins="https://app.example")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
        assert "TRL_CORS_ORIGINS" in refused.json()["error"]["message"]


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
