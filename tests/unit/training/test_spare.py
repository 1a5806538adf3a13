"""A spare trainer takes on a job as if it had been started for it, and never outlives its supervisor.

The preparations are stand-ins: what recipes import is a matter of tests/integration/test_spare_imports.py.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from bento_service.training.spare import LISTENING, TAKEN, Orders

SECONDS = 30
WAITS = "lambda: None"
PREPARES = "lambda: print('preparing', flush=True) or threading.Event().wait()"  # for ever
PROGRAM = """
import json, os, sys, threading
from bento_service.training import spare
orders = spare.await_orders({prepare})
print(json.dumps([orders.attempt, os.getcwd(), dict(os.environ), sys.stdin.read(), open(spare._OOM_SCORE).read()]))
"""


@contextmanager
def spare(prepare):
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(prepare=prepare)],
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            env={**os.environ, "ONLY_BEFORE": "1", "CHANGED": "before"},
        )
        theirs.close()
        try:
            assert ours.recv(64) == LISTENING
            yield process, ours
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def send(channel, run_directory, **environment):
    orders = Orders(run_directory=run_directory, attempt=2, environment={"PATH": os.environ["PATH"], **environment})
    channel.sendall(orders.model_dump_json().encode() + b"\n")


def test_it_takes_on_folder_log_and_environment(tmp_path):
    (tmp_path / "trainer.log").write_text("attempt 1\n")
    with spare(WAITS) as (process, channel):
        send(channel, tmp_path, CHANGED="after")
        assert channel.recv(64) == TAKEN
        assert process.wait(SECONDS) == 0
        assert process.stdout.read() == b""
    first, last = (tmp_path / "trainer.log").read_text().splitlines()
    attempt, folder, environment, standard_input, oom_score = json.loads(last)
    assert (first, attempt, folder, standard_input) == ("attempt 1", 2, str(tmp_path), "")
    assert {name: value for name, value in environment.items() if name != "LC_CTYPE"} == {
        "PATH": os.environ["PATH"],
        "CHANGED": "after",
    }
    assert oom_score == Path("/proc/self/oom_score_adj").read_text()


def test_orders_are_taken_while_it_prepares_and_the_kernel_takes_it_first_until_then(tmp_path):
    with spare(PREPARES) as (process, channel):
        assert process.stdout.readline() == b"preparing\n"
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
        send(channel, tmp_path)
        assert channel.recv(64) == TAKEN


def test_it_ends_with_its_supervisor_even_while_it_prepares():
    for part_of_orders in (b"", b'{"run_directory": "/tmp"'):
        with spare(PREPARES) as (process, channel):
            assert process.stdout.readline() == b"preparing\n"
            channel.sendall(part_of_orders)
            channel.close()
            assert process.wait(SECONDS) == 0


def test_orders_that_it_cannot_follow_are_not_taken(tmp_path):
    for line in (b"no JSON\n", Orders(run_directory=tmp_path / "gone", attempt=1, environment={}).model_dump_json()):
        with spare(PREPARES) as (process, channel):
            channel.sendall(line if isinstance(line, bytes) else line.encode() + b"\n")
            assert channel.recv(64) == b""
            assert process.wait(SECONDS) == 1
