"""What the bodies share: strictness, whole seconds, pages of lists."""

from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from bento_service.jobs.job import Page

# PostgreSQL has no text with a NUL in it.
NO_NUL = r"^[^\x00]*$"


class Strict(BaseModel):
    """Base of request bodies: unknown keys are refused, and so are infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ListOf[T: BaseModel](BaseModel):
    """One page of a list. The next one starts with ``after=<last_id>``."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None


class HasId(Protocol):
    @property
    def id(self) -> str: ...


def page_of[D: HasId, W: BaseModel](page: Page[D], wire: Sequence[W]) -> ListOf[W]:
    """A page of domain objects that were converted to ``wire``."""
    return ListOf(
        data=list(wire),
        has_more=page.has_more,
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
    )


def seconds(moment: float | None) -> int | None:
    """Whole unix seconds."""
    return None if moment is None else int(moment)
