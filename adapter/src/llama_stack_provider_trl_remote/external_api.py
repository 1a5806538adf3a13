"""post_training as an external API, for releases that have none of their own (Llama Stack 0.7, OGX).

``apis.d/post_training.yaml`` names this module; the stack takes the protocol, the providers and the routes from it.
"""

from typing import Any

from .protocol import PostTraining
from .provider import get_provider_spec
from .routes import create_router

__all__ = ["PostTraining", "available_providers", "create_router"]


def available_providers() -> list[Any]:
    return [get_provider_spec()]
