"""The HTTP API in this process on a real store, as the other tests of the API have it."""

from tests.unit.api.conftest import client, impl

__all__ = ["client", "impl"]
