"""A Starlette app that is made when it is first needed."""

from collections.abc import Callable
from functools import cached_property

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send


class LateApp[App: Starlette](Starlette):
    """``make`` runs once: at the first request, or when ``app`` or ``routes`` is first read.

    A Starlette itself, since of such a one BentoML takes only the paths that its routes match.
    """

    def __init__(self, make: Callable[[], App]) -> None:
        super().__init__()
        self._make = make

    @cached_property
    def app(self) -> App:
        return self._make()

    @property
    def routes(self) -> list[BaseRoute]:
        return self.app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
