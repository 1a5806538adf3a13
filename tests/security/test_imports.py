"""Files from URLs: only from where the operator says, only from addresses that were checked, and bounded.

The server is a real one on this host, reached by its name through ``TRL_IMPORT_PRIVATE_HOSTS``; names that would lead
elsewhere are resolved by the test.
"""

import ssl
import threading
import time
from contextlib import ExitStack

import pytest
import trustme
from pydantic import ValidationError
from starlette.testclient import TestClient

from bento_service.api.app import create_app, in_front_of
from bento_service.errors import ImportFailed, ImportRefused, InvalidRequest, TooLarge
from bento_service.files import FileStorage
from bento_service.settings import Settings
from bento_service.url_import.addresses import is_public, system_resolve
from bento_service.url_import.allowlist import ImportUrl, UrlPattern
from bento_service.url_import.download import UrlImports
from tests.core_factory import PAIRS, json_lines
from tests.data_server import content, data_server, redirect

DATA = json_lines(PAIRS)
LOCAL = "127.0.0.1"


@pytest.fixture(scope="module")
def web():
    with data_server() as server:
        yield server


@pytest.fixture
def server(web):
    web.answers.clear()
    web.requests.clear()
    web.answers["/data/pairs.jsonl"] = content(DATA)
    return web


@pytest.fixture
def fetch(tmp_path):
    """Download a URL with some settings: the bytes that were stored."""

    def run(url, *, resolve=lambda host, port: [LOCAL], **settings):
        chosen = Settings(home=tmp_path, **({"import_private_hosts": LOCAL} | settings))
        storage = FileStorage(chosen.files_path, chosen.max_file_bytes)
        try:
            with storage.receive() as incoming:
                UrlImports(chosen, resolve=resolve).download(url, incoming)
                return storage.path_of(incoming.commit().sha256).read_bytes()
        finally:
            assert list(storage.incoming.iterdir()) == []  # nothing half-made stays, whatever happened

    return run


def allowing(server, path=""):
    return {"import_urls": f"http://*:{server.port}{path}"}


def test_an_allowed_url_becomes_a_file_like_an_upload(client, impl, server, monkeypatch):
    """An import is off until the operator allows the place; then it makes an ordinary file."""
    url = server.url("/data/pairs.jsonl?signature=secret")
    refused = client.post("/v1/files/import", json={"url": url})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "import_refused")
    assert "TRL_IMPORT_URLS" in refused.json()["error"]["message"]
    assert server.requests == []

    allowed = Settings(home=impl.settings.home, import_private_hosts=LOCAL, **allowing(server))
    monkeypatch.setattr(impl, "_imports", UrlImports(allowed))
    file = client.post("/v1/files/import", json={"url": url, "purpose": "fine-tune"}).json()
    assert (file["object"], file["filename"], file["bytes"]) == ("file", "pairs.jsonl", len(DATA))
    assert client.get(f"/v1/files/{file['id']}/content").content == DATA
    named = client.post("/v1/files/import", json={"url": url, "filename": "mine.jsonl"}).json()
    assert named["filename"] == "mine.jsonl"
    assert client.post("/v1/files/import", json={"url": url, "purpose": "vision"}).status_code == 400
    assert client.post("/v1/files/import", json={"url": url, "headers": {}}).status_code == 400


class TestOnlyAllowedPlaces:
    """Scheme, host, port and path of a URL are those of an entry of TRL_IMPORT_URLS."""

    @pytest.mark.parametrize(
        ("pattern", "url"),
        [
            ("https://data.example.org", "https://data.example.org/a/b.jsonl?x=1"),
            ("https://data.example.org", "https://DATA.example.org.:443/a"),
            ("https://data.example.org/public/", "https://data.example.org/public/a"),
            ("https://*.hf.co", "https://cdn-lfs.hf.co/a"),
            ("https://*.hf.co", "https://a.b.hf.co/a"),
            ("https://*", "https://anything.example/a"),
            ("http://[2001:db8::1]:81", "http://[2001:db8::1]:81/a"),
            ("https://huggingface.co", "huggingface://datasets/org/name@v1/data/train.jsonl"),
            ("https://bücher.example", "https://xn--bcher-kva.example/a"),
        ],
    )
    def test_allowed(self, pattern, url):
        assert UrlPattern.parse(pattern).allows(ImportUrl.parse(url))

    @pytest.mark.parametrize(
        ("pattern", "url"),
        [
            ("https://data.example.org", "http://data.example.org/a"),
            ("https://data.example.org", "https://data.example.org:8443/a"),
            ("https://data.example.org", "https://data.example.org.evil.example/a"),
            ("https://data.example.org", "https://evil.example/https://data.example.org"),
            ("https://data.example.org/public", "https://data.example.org/publicity"),
            ("https://data.example.org/public", "https://data.example.org/public/../secret"),
            ("https://*.hf.co", "https://hf.co/a"),
            ("https://*.hf.co", "https://evilhf.co/a"),
            ("https://hub.example", "huggingface://datasets/org/name/train.jsonl"),
        ],
    )
    def test_not_allowed(self, pattern, url):
        assert not UrlPattern.parse(pattern).allows(ImportUrl.parse(url))

    @pytest.mark.parametrize(
        "url",
        [
            "file:///etc/passwd",
            "ftp://data.example.org/a",
            "gopher://127.0.0.1:6379/_x",
            "data:text/plain,x",
            "//data.example.org/a",
            "https:///a",
            "https://user:password@data.example.org/a",
            "https://data.example.org@evil.example/a",
            "https://data.example.org/public/%2e%2e/secret",
            "https://data.example.org/public/..%2fsecret",
            "https://data.example.org/public/..%5csecret",
            "https://data.example.org/a\r\nX-Injected: 1",
            "https://[::1/a",
            "https://0177.0.0.1/a",
            "https://data.example.org:99999/a",
            "https://data.example.org/" + "a" * 3000,
            "huggingface://models/org/name/file",
            "huggingface://datasets/org",
            "huggingface://datasets/org/name/../../../etc",
        ],
    )
    def test_what_is_no_plain_web_address_is_refused(self, url):
        with pytest.raises(InvalidRequest):
            ImportUrl.parse(url)

    def test_a_place_that_is_not_allowed_is_not_even_looked_up(self, fetch, server):
        def unasked(host, port):
            raise AssertionError(f"{host} was looked up")

        with pytest.raises(ImportRefused, match="TRL_IMPORT_URLS"):
            fetch(server.url("/data/pairs.jsonl"), resolve=unasked, import_urls="https://data.example.org")

    @pytest.mark.parametrize(
        "text",
        ["data.example.org", "ftp://data.example.org", "https://", "https://a*.example", "https://*example.org",
         "https://u:p@data.example.org", "https://data.example.org/?q", "https://data.example.org/a/../b"],
    )  # fmt: skip
    def test_an_entry_that_means_nothing_stops_the_start(self, text):
        with pytest.raises(ValidationError):
            Settings(import_urls=text)


class TestOnlyPublicAddresses:
    """A name leads to a public address, or to a host that the operator named in TRL_IMPORT_PRIVATE_HOSTS."""

    @pytest.mark.parametrize(
        "address",
        [
            "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1",
            "192.0.2.1", "192.168.1.1", "198.18.0.1", "224.0.0.1", "224.0.1.1", "239.1.1.1", "240.0.0.1",
            "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::a00:1",
            "64:ff9b::808:808", "64:ff9b:1::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "fc00::1", "fd12::1",
            "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "localhost", "",
        ],
    )  # fmt: skip
    def test_other_addresses(self, address, fetch, server):
        assert not is_public(address)
        with pytest.raises(ImportRefused, match="TRL_IMPORT_PRIVATE_HOSTS"):
            fetch(server.url("/data/pairs.jsonl", "rebound.example"), resolve=lambda *_: [address], **allowing(server))
        assert server.requests == []

    @pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::1"])
    def test_public_addresses(self, address):
        assert is_public(address)

    def test_one_private_address_among_public_ones_is_enough(self, fetch, server):
        url = server.url("/data/pairs.jsonl", "mixed.example")
        with pytest.raises(ImportRefused):
            fetch(url, resolve=lambda *_: ["8.8.8.8", "10.0.0.1"], **allowing(server))

    @pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1"])
    def test_other_spellings_of_an_address_are_looked_up_like_names(self, host, fetch, server):
        with pytest.raises((ImportRefused, ImportFailed)):
            fetch(server.url("/data/pairs.jsonl", host), resolve=system_resolve, **allowing(server))
        assert server.requests == []

    def test_the_address_that_was_checked_is_the_one_that_is_connected_to(self, fetch, server):
        """The name is looked up once: a second answer (DNS rebinding) is never asked for."""
        asked = []

        def resolve(host, port):
            asked.append(host)
            return [LOCAL] if len(asked) == 1 else ["192.0.2.1"]

        hosts = {"import_private_hosts": "data.internal"}
        assert fetch(server.url("/data/pairs.jsonl", "data.internal"), resolve=resolve, **hosts, **allowing(server))
        assert asked == ["data.internal"]
        assert server.requests[0][1]["host"] == f"data.internal:{server.port}"

    @pytest.mark.parametrize("text", ["https://data.internal", "data.internal:8080", "a b", "u@h", "a/b"])
    def test_an_entry_that_is_no_host_stops_the_start(self, text):
        with pytest.raises(ValidationError):
            Settings(import_private_hosts=text)


class TestRedirects:
    """Each redirect is a URL like the first: checked anew, and not followed for ever."""

    def test_to_an_allowed_place(self, fetch, server):
        server.answers["/data/old"] = redirect("pairs.jsonl")
        assert fetch(server.url("/data/old"), **allowing(server, "/data")) == DATA

    @pytest.mark.parametrize(
        "location",
        ["/secret/pairs.jsonl", "http://127.0.0.1:1/data/x", "https://evil.example/", "file:///etc/passwd",
         "http://user:password@127.0.0.1/"],
    )  # fmt: skip
    def test_to_another_place(self, fetch, server, location):
        server.answers["/data/old"] = redirect(location)
        server.answers["/secret/pairs.jsonl"] = content(DATA)
        with pytest.raises((ImportRefused, InvalidRequest)):
            fetch(server.url("/data/old"), **allowing(server, "/data"))
        assert [target for target, _ in server.requests] == ["/data/old"]

    def test_to_a_private_address(self, fetch, server):
        server.answers["/data/old"] = redirect(server.url("/data/pairs.jsonl", "inside.example"))
        addresses = {LOCAL: [LOCAL], "inside.example": ["10.0.0.1"]}
        with pytest.raises(ImportRefused, match=r"inside\.example"):
            fetch(server.url("/data/old"), resolve=lambda host, _: addresses[host], **allowing(server))

    def test_in_a_circle(self, fetch, server):
        server.answers["/data/old"] = redirect("/data/old")
        with pytest.raises(ImportFailed, match="times"):
            fetch(server.url("/data/old"), **allowing(server))
        assert len(server.requests) == 6


class TestBounds:
    """An import is no larger than an upload may be, and ends in time."""

    @pytest.mark.parametrize("announced", [True, False])
    def test_size(self, fetch, server, announced):
        data = b"x" * 200_000
        server.answers["/data/large"] = content(data) if announced else _unannounced(data)
        with pytest.raises(TooLarge, match="TRL_MAX_FILE_BYTES"):
            fetch(server.url("/data/large"), max_file_bytes=100_000, **allowing(server))

    @pytest.mark.parametrize("pause", [0.02, 20], ids=["little", "nothing"])
    def test_time_however_little_is_sent_at_a_time(self, fetch, server, pause):
        done = threading.Event()

        def trickle(request):
            request.send_response(200)
            request.end_headers()
            while not done.wait(pause):
                try:
                    request.wfile.write(b"x")
                except OSError:
                    break

        server.answers["/data/slow"] = trickle
        began = time.monotonic()
        try:
            with pytest.raises(ImportFailed, match="TRL_IMPORT_SECONDS"):
                fetch(server.url("/data/slow"), import_seconds=0.5, **allowing(server))
        finally:
            done.set()
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (content(DATA[:10], content_length=str(len(DATA))), "could not be read"),
            (content(b"no", 404), "status 404"),
            (content(b"no", 401, www_authenticate="Basic"), "credentials are not sent"),
            (content(DATA, 206), "status 206"),
            (content(DATA, content_encoding="br"), "encoding"),
        ],
    )
    def test_what_is_no_whole_file(self, fetch, server, answer, says):
        server.answers["/data/odd"] = answer
        with pytest.raises(ImportFailed, match=says):
            fetch(server.url("/data/odd"), **allowing(server))

    def test_a_host_without_an_address_or_a_server(self, fetch, server):
        def unknown(host, port):
            raise OSError("Name or service not known")

        with pytest.raises(ImportFailed, match="has no address"):
            fetch("http://absent.example/a", resolve=unknown, import_urls="http://*")
        with pytest.raises(ImportFailed, match="could not be read"):
            fetch("http://127.0.0.1:1/a", import_urls="http://127.0.0.1:1")


def test_nothing_of_the_service_is_sent_along(fetch, server, monkeypatch, tmp_path):
    """No credentials and no cookies, and not through a proxy of the environment."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    server.answers["/data/old"] = content(b"", 302, location="pairs.jsonl", set_cookie="session=1; Path=/")
    fetch(server.url("/data/old"), api_keys="kept-secret", **allowing(server))
    for _, headers in server.requests:
        assert set(headers) == {"host", "user-agent", "accept", "accept-encoding"}


class TestTls:
    """The server's certificate is verified, against the name in the URL and not the address behind it."""

    @pytest.fixture
    def secure(self, tmp_path):
        authority = trustme.CA()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("data.internal").configure_cert(context)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        with data_server(context) as server:
            server.answers["/a"] = content(DATA)
            self.settings = {"import_urls": f"https://*:{server.port}", "import_private_hosts": "data.internal,other"}
            yield server

    def test_its_own_name(self, fetch, secure, monkeypatch, tmp_path):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert fetch(secure.url("/a", "data.internal"), **self.settings) == DATA

    def test_another_name(self, fetch, secure, monkeypatch, tmp_path):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        with pytest.raises(ImportFailed, match=r"(?i)certificate"):
            fetch(secure.url("/a", "other"), **self.settings)

    def test_an_unknown_authority(self, fetch, secure):
        with pytest.raises(ImportFailed, match=r"(?i)certificate"):
            fetch(secure.url("/a", "data.internal"), **self.settings)


def test_imports_take_places_of_uploads(impl, server):
    """As many uploads and imports at once as TRL_MAX_UPLOADS says; one more is told to come later."""
    app = create_app(impl)
    limit = impl.settings.max_uploads
    with TestClient(in_front_of(app, impl.settings), base_url="http://localhost", client=(LOCAL, 1)) as caller:
        with ExitStack() as places:
            for _ in range(limit):
                places.enter_context(app.state.uploads.place(limit))
            for answer in (
                caller.post("/v1/files/import", json={"url": server.url("/data/pairs.jsonl")}),
                caller.post("/v1/files", files={"file": ("pairs.jsonl", DATA)}),
            ):
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
                assert "TRL_MAX_UPLOADS" in answer.json()["error"]["message"]
        assert caller.post("/v1/files", files={"file": ("pairs.jsonl", DATA)}).status_code == 200


def _unannounced(data):
    def answer(request):
        request.send_response(200)
        request.end_headers()
        try:
            request.wfile.write(data)
        except OSError:
            pass  # the service has enough

    return answer
