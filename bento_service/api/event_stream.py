"""A job's events as server-sent events, from any point of its history until its end.

Each event has its id, its type and, as data, the object that the list of events has too. The last message of a job
that has ended is of type ``done`` with the data ``[DONE]``. A comment is sent every 15 seconds, so that proxies keep
a quiet stream open.
"""

from collections.abc import AsyncIterator
from functools import partial

import structlog
from anyio import CapacityLimiter, sleep
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from bento_service.api.context import read
from bento_service.api.errors import answer
from bento_service.api.wire import EventObject
from bento_service.errors import Overloaded
from bento_service.post_training import TrlPostTrainingImpl

log = structlog.get_logger("bento_service.api")

# With the supervisor's own period of 0.25 s an event is seen well within a second of its writing.
POLL_SECONDS = 0.25
HEARTBEAT_SECONDS = 15
# A watcher that takes no byte for this long is gone, and its place is another's.
SEND_SECONDS = 60
# Streams share these threads, so that many watchers never take those of the other routes.
READERS = 4


class Heartbeat(ServerSentEvent):
    """A comment alone, without the empty line that ends a message: OpenAI's client takes one for a message without
    data, and fails."""

    def encode(self) -> bytes:
        return b": ping\r\n"


class EventStreams:
    """The streams of one API process: how many there are, and the threads that they read with."""

    def __init__(self) -> None:
        self.open = 0
        self.readers = CapacityLimiter(READERS)


class EventStream(EventSourceResponse):
    """The events of a job after number ``after_seq``. Answers 503 when ``max_streams`` are open already."""

    def __init__(self, streams: EventStreams, impl: TrlPostTrainingImpl, job_id: str, *, after_seq: int) -> None:
        self._streams = streams
        self._limit = impl.settings.max_streams
        self._job_id = job_id
        super().__init__(
            _messages(streams, impl, job_id, after_seq),
            ping=HEARTBEAT_SECONDS,
            ping_message_factory=Heartbeat,
            send_timeout=SEND_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streams.open >= self._limit:
            full = Overloaded(
                f"{self._limit} event streams are open on this service, and it has room for no more "
                "(TRL_MAX_STREAMS): try again later, or read the events page by page."
            )
            await answer(full)(scope, receive, send)
            return
        self._streams.open += 1
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("stream.abandoned", job=self._job_id, seconds=SEND_SECONDS)
        finally:
            self._streams.open -= 1


async def _messages(
    streams: EventStreams, impl: TrlPostTrainingImpl, job_id: str, seq: int
) -> AsyncIterator[ServerSentEvent]:
    while True:
        news = await read(impl, partial(impl.news, job_id, after_seq=seq), streams.readers)
        for event in news.events:
            yield ServerSentEvent(EventObject.of(event).model_dump_json(), id=event.id, event=event.type)
            seq = event.seq
        if news.ended:
            yield ServerSentEvent("[DONE]", event="done")
            return
        if not news.has_more:
            await sleep(POLL_SECONDS)
