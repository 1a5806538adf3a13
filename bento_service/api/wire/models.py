"""Models, in the shapes of OpenAI's models API."""

from typing import Literal

from pydantic import BaseModel, Field

from bento_service.model_catalog import Model
from bento_service.training.spec import MethodName


class TrlModel(BaseModel):
    kind: Literal["base", "trained"]
    base_model: str | None = Field(description="That a trained model was made from.")
    method: MethodName | None = Field(description="That a trained model was trained with; `reward`: it scores.")
    job_id: str | None = Field(description="The job that made a trained model.")


class ModelObject(BaseModel):
    """A model that a job can start from, or that one has made."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = Field(description="Of a base model its organization, of a trained one trl-remote.")
    shutdown_date: None = Field(default=None, description="For compatibility: always null.")
    trl: TrlModel

    @classmethod
    def of(cls, model: Model) -> "ModelObject":
        organization = model.id.partition("/")[0] if "/" in model.id else "local"
        return cls(
            id=model.id,
            created=int(model.created_at),
            owned_by=organization if model.kind == "base" else "trl-remote",
            trl=TrlModel(kind=model.kind, base_model=model.base_model, method=model.method, job_id=model.job_id),
        )


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelList(BaseModel):
    """All models; OpenAI's list of models has no pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
