"""The models of this service: base models in the models folder, and what jobs have trained."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bento_service.errors import NotFound
from bento_service.training.models import local_models
from bento_service.training.spec import MethodName

if TYPE_CHECKING:
    from bento_service.jobs.store import Store

# The names that ``TrlPostTrainingImpl.submit`` gives: they end with the hex digits of the job's id.
_TRAINED = re.compile(r"ft:.+:([0-9a-f]{24})")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that a job can start from, or that one has made."""

    id: str
    kind: Literal["base", "trained"]
    created_at: float  # unix seconds: when the folder was made, or the job ended
    base_model: str | None = None  # of a trained model
    method: MethodName | None = None  # that it was trained with
    job_id: str | None = None  # that trained it


class ModelCatalog:
    """Reads the models folder and the store anew each time."""

    def __init__(self, models_path: Path, store: "Store") -> None:
        self._path = models_path
        self._store = store

    def all(self) -> list[Model]:
        """Base models by name, then trained ones, newest first; those whose final checkpoint was deleted are gone."""
        return [*map(self._base, local_models(self._path)), *self._trained()]

    def get(self, name: str) -> Model:
        """Raises NotFound."""
        if name in local_models(self._path):
            return self._base(name)
        match = _TRAINED.fullmatch(name)
        if match is not None:
            for model in self._trained(f"ftjob-{match[1]}"):
                if model.id == name:
                    return model
        raise NotFound(f"No model {name[:300]!r}; GET /v1/models lists them.", param="model")

    def _base(self, name: str) -> Model:
        return Model(id=name, kind="base", created_at=(self._path / name / "config.json").stat().st_mtime)

    def _trained(self, job_id: str | None = None) -> list[Model]:
        return [
            Model(
                id=trained.name,
                kind="trained",
                created_at=trained.finished_at,
                base_model=trained.base_model,
                method=trained.method,
                job_id=trained.job_id,
            )
            for trained in self._store.trained_models(job_id)
        ]
