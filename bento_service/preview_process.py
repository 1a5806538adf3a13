"""Running ``training.preview`` in a process of its own: few at once, in bounded time, ended with whoever asked."""

import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

import structlog
from pydantic import ValidationError

from bento_service.errors import Overloaded
from bento_service.jobs.launcher import trainer_environment
from bento_service.settings import Settings
from bento_service.training.preview import Order, Preview

log = structlog.get_logger("bento_service")

# Beside the time for tokenizing: to import the tokenizers, and to read large files, which takes as long as a submit.
READING_SECONDS = 600.0
_POLL_SECONDS = 0.1


class PreviewProcesses:
    """The previews of one API process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._room = threading.BoundedSemaphore(settings.max_validations)

    def run(self, order: Order, cancelled: threading.Event) -> Preview:
        """Blocks until the preview is there; ends it when ``cancelled`` is set.

        Raises Overloaded when ``max_validations`` run already, and when it was cancelled, was killed or took too long.
        """
        if not self._room.acquire(blocking=False):
            raise Overloaded(
                f"{self._settings.max_validations} validations run on this service, and it has room for no more "
                "(TRL_MAX_VALIDATIONS): try again later."
            )
        try:
            return self._run(order, cancelled)
        finally:
            self._room.release()

    def _run(self, order: Order, cancelled: threading.Event) -> Preview:
        with (
            tempfile.TemporaryDirectory(prefix="trl-preview-") as folder,
            tempfile.TemporaryFile() as answer,
            tempfile.TemporaryFile() as complaints,
        ):
            process = subprocess.Popen(
                [sys.executable, "-m", "bento_service.training.preview"],
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=complaints,
                cwd=folder,
                env=trainer_environment((), "cpu", threads=1) | {"TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
            assert process.stdin is not None
            try:
                _say(process.stdin, order.model_dump_json().encode() + b"\n")
                deadline = time.monotonic() + order.seconds + READING_SECONDS
                while process.poll() is None:
                    if cancelled.wait(_POLL_SECONDS):
                        raise Overloaded("The validation was cancelled: the service stops, or its caller has gone.")
                    if time.monotonic() > deadline:
                        raise Overloaded(
                            f"The validation took longer than {order.seconds + READING_SECONDS:.0f} s: submit the "
                            "job, or validate a part of the data."
                        )
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                process.stdin.close()
            answer.seek(0)
            text = answer.read()
            try:
                return Preview.model_validate_json(text)
            except ValidationError as error:
                complaints.seek(0)
                tail = complaints.read()[-4000:].decode("utf-8", "replace")
                log.error("validation.failed", exit_status=process.returncode, stderr=tail)
                raise Overloaded(
                    f"The process that validates ended without an answer (exit status {process.returncode}); the "
                    "service's log has its last words."
                ) from error


def _say(stream: IO[bytes], line: bytes) -> None:
    try:
        stream.write(line)
        stream.flush()
    except BrokenPipeError:
        pass  # it died at once; that it left no answer tells
