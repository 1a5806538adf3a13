"""Conversations that a model's chat template refuses, told by their file and row.

Whether a row is refused shows only when it is tokenized, many at once, by TRL or ``tokenization``; which one it was is
found out afterwards, one by one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bento_service.errors import InvalidDataset, RefusedConversation
from bento_service.training.dataset_report import Row
from bento_service.training.preferences import numbered_rows
from bento_service.training.spec import TrainingSpec
from bento_service.training.tokenization import row_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_refusal(error: Exception) -> bool:
    from jinja2 import TemplateError

    return isinstance(error, TemplateError | RefusedConversation)


def explain(error: Exception, spec: TrainingSpec) -> None:
    """Raises InvalidDataset with the row when ``error``, which ended a recipe, is a refusal; else nothing happens."""
    if not is_refusal(error):
        return
    from bento_service.training.models import load_tokenizer

    folder = Path(spec.model_path) if spec.model_path is not None else None
    tokenizer = load_tokenizer(spec.model, folder, conversational=True, trust_remote_code=spec.trust_remote_code)
    for file, param in ((spec.training_file, "training_file"), (spec.validation_file, "validation_file")):
        if file is not None:
            require_accepted(numbered_rows(Path(file)), param, spec, tokenizer, cause=error)


def require_accepted(
    rows: Iterable[tuple[int, Row]],
    param: str,
    spec: TrainingSpec,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cause: Exception,
) -> None:
    """Raises InvalidDataset for the first of the numbered rows that is refused."""
    for number, row in rows:
        try:
            row_tokens([row], tokenizer, replies_only=learns_replies_only(spec))
        except Exception as error:
            if not is_refusal(error):
                raise
            raise InvalidDataset(
                f"{param}: row {number}: the model's chat template does not take the conversation: {error}. "
                "Change its messages, or take another model.",
                param=param,
            ) from cause


def learns_replies_only(spec: TrainingSpec) -> bool:
    """Whether only replies are learned, and not what they reply to."""
    return spec.method != "supervised" or spec.options.sft.completion_only_loss
