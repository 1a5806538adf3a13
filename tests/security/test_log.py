"""What the service's log says of a failure, and what it must not."""

import os
import pty
import subprocess
import sys

import pytest

from tests.bento_server import REPOSITORY

FAILING = """
import structlog
from bento_service.logs import configure_logs

def check(headers):
    raise RuntimeError("no such thing")

configure_logs()
try:
    check({"x-api-key": "kept" + "-secret"})
except RuntimeError as error:
    structlog.get_logger().error("request.crashed", exc_info=error)
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_traceback_shows_no_values(terminal):
    """Local variables hold what callers sent: keys, rows, addresses."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-c", FAILING],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stderr=theirs,
            check=True,
            timeout=60,
        )
        logged = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "request.crashed" in logged and "no such thing" in logged
    assert "kept-secret" not in logged
