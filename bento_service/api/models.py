"""``/v1/models``: what a job can start from, and what jobs have made."""

from typing import Annotated

from fastapi import APIRouter, Path

from bento_service.api.context import Impl, error_answers
from bento_service.api.wire import ModelDeleted, ModelList, ModelObject

router = APIRouter(prefix="/v1/models", tags=["Models"])

# Names have slashes, and OpenAI's client writes them as they are or as %2F.
ModelName = Annotated[str, Path(max_length=512, description="As the list has it, slashes and all.")]


@router.get("", summary="List models", responses=error_answers())
def list_models(impl: Impl) -> ModelList:
    """The base models in the service's models folder by name, then the trained ones, newest first.

    A trained model is listed as long as its final checkpoint is kept.
    """
    return ModelList(data=[ModelObject.of(model) for model in impl.list_models()])


@router.get("/{model:path}", summary="Describe a model", responses=error_answers(400, 404))
def get_model(model: ModelName, impl: Impl) -> ModelObject:
    return ModelObject.of(impl.get_model(model))


@router.delete("/{model:path}", summary="Delete a model", responses=error_answers(400, 404))
def delete_model(model: ModelName, impl: Impl) -> ModelDeleted:
    """Deletes a trained model with all checkpoints, the manifest and the log of its job. The job, its events and its
    result files stay. Base models are the operator's: 404.
    """
    impl.delete_model(model)
    return ModelDeleted(id=model)
