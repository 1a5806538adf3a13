"""API keys as an operator writes them: secrets, each with a name that may be shown."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import SecretStr
from pydantic_core import from_json

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """``name`` stands for the caller in logs and on jobs; ``secret`` is never written anywhere."""

    name: str
    secret: SecretStr


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Keys from ``NAME:KEY,KEY,...`` or a JSON object ``{"NAME": "KEY"}``, for keys with a comma or a colon in them.

    A key without a name is called ``key-N`` after its place. Two keys may share a name, so that one can take the
    other's place. Raises ValueError, whose message holds no key.
    """
    return tuple(_keys(text.strip()))


def _keys(text: str) -> Iterator[ApiKey]:
    for place, (name, secret) in enumerate(_pairs(text), start=1):
        name = f"key-{place}" if name is None else name
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of key {place} is not 1 to 64 letters, digits, '_', '.' or '-'")
        if not isinstance(secret, str) or not secret.strip():
            raise ValueError(f"key {place} ({name}) is empty, or no text")
        if any(character.isspace() or not character.isprintable() for character in secret.strip()):
            raise ValueError(f"key {place} ({name}) has a space or a control character inside")
        yield ApiKey(name=name, secret=SecretStr(secret.strip()))


def _pairs(text: str) -> Iterator[tuple[str | None, object]]:
    if text.startswith("{"):
        try:
            yield from from_json(text).items()
        except ValueError:
            # Without the parser's own words, which quote the text.
            raise ValueError('it starts with "{" but is not a JSON object of names and keys') from None
        return
    for part in filter(None, map(str.strip, text.split(","))):
        name, colon, secret = part.partition(":")
        yield (name.strip(), secret) if colon else (None, part)
