"""HEAD wherever there is GET: the same answer without its body."""

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadRequests:
    """Routes see a GET. Once its headers are known it is ended, so that nothing is read from disk for no one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        with anyio.CancelScope() as ended:

            async def headers_only(message: Message) -> None:
                if message["type"] == "http.response.start":
                    with anyio.CancelScope(shield=True):
                        await send(message)
                        await send({"type": "http.response.body", "body": b"", "more_body": False})
                    ended.cancel()
                    await anyio.sleep(0)

            await self._app({**scope, "method": "GET"}, receive, headers_only)
