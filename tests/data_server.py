"""An HTTP server to import files from: it answers what a test told it to, and remembers what it was sent."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class DataServer:
    port: int
    tls: bool
    answers: dict[str, Answer] = field(default_factory=dict)  # by path, without the query
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # target and headers, as they came

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"


def content(data: bytes, status: int = 200, **headers: str) -> Answer:
    """Answer these bytes; headers are written with "_" for "-"."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in ({"content_length": str(len(data))} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def redirect(location: str) -> Answer:
    return content(b"", 302, location=location)


@contextmanager
def data_server(tls: ssl.SSLContext | None = None) -> Iterator[DataServer]:
    """Serves on a free port of 127.0.0.1 until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            server.answers.get(self.path.partition("?")[0], content(b"nothing here", 404))(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        if tls is not None:
            http.socket = tls.wrap_socket(http.socket, server_side=True)
        server = DataServer(http.server_address[1], tls is not None)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
