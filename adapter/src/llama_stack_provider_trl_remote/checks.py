"""Numbers of a request that no training can use, refused by the field's name."""

import math

from .errors import RequestRefused


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise RequestRefused(f"{name} must be at least 1, it is {value}")
    return value


def cap(name: str, value: int | None) -> int | None:
    """A limit where -1 and null mean none."""
    if value is None or value == -1:
        return None
    if value < 1:
        raise RequestRefused(f"{name} must be at least 1, or -1 for no limit; it is {value}")
    return value


def finite(name: str, value: float) -> float:
    # JSON has no NaN and no infinity, but Python's reader takes them.
    if not math.isfinite(value):
        raise RequestRefused(f"{name} must be a finite number, it is {value}")
    return value


def above_zero(name: str, value: float) -> float:
    if finite(name, value) <= 0:
        raise RequestRefused(f"{name} must be greater than 0, it is {value}")
    return value
