"""Base models: finding one by the name a user gives, and loading it with its tokenizer.

Finding imports nothing heavy (the API process does it); loading imports transformers.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bento_service.errors import InvalidRequest, UnknownModel
from bento_service.training.quantization import Quantization, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The names the hub allows: <org>/<name> or a bare <name>, letters, digits, "-", "_" and ".".
_SEGMENT = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})?")


def find_model(name: str, models_path: Path) -> Path | None:
    """The local folder of a base model, or None when there is none and only the hub can have it.

    Raises UnknownModel for a name that is no model name (a path, for one), for a folder that leads out of
    ``models_path``, and for one that holds no model or files that this process may not read.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise UnknownModel(
            f"{name!r} is not a model name: write <org>/<name>, as on the Hugging Face hub; paths are not accepted",
            param="model",
        )
    folder = models_path / name
    if not folder.is_dir():
        return None
    resolved = folder.resolve()
    if not resolved.is_relative_to(models_path.resolve()):
        raise UnknownModel(
            f"model {name} is a link that leads out of the models directory: put the model itself there",
            param="model",
        )
    _require_readable(name, resolved)
    if not (resolved / "config.json").is_file():
        raise UnknownModel(
            f"model {name} has a folder in the models directory, but without config.json: it is not a whole model",
            param="model",
        )
    return resolved


def _require_readable(name: str, folder: Path) -> None:
    """In a container the service's user is seldom the one who put the model there; weights are often saved 0600."""
    if not os.access(folder, os.R_OK | os.X_OK):
        unreadable = ["its folder"]
    else:
        unreadable = [
            file.name for file in sorted(folder.iterdir()) if file.is_file() and not os.access(file, os.R_OK)
        ]
    if unreadable:
        raise UnknownModel(
            f"model {name} is in the models directory, but the service's user (uid {os.geteuid()}) may not read "
            f"{', '.join(unreadable)}: chmod -R a+rX the folder, or chown it",
            param="model",
        )


def local_models(models_path: Path) -> list[str]:
    """Names of the models that ``find_model`` finds locally, sorted."""
    configs = [*models_path.glob("*/config.json"), *models_path.glob("*/*/config.json")]
    names = (config.parent.relative_to(models_path).as_posix() for config in configs)
    return sorted(name for name in names if _is_found(name, models_path))


def _is_found(name: str, models_path: Path) -> bool:
    try:
        return find_model(name, models_path) is not None
    except UnknownModel:
        return False


def load_tokenizer(
    name: str, folder: Path | None, *, conversational: bool, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base model, from its local folder or else from the hub by name.

    Raises UnknownModel when it cannot be had, InvalidRequest when ``conversational`` data needs a chat template that
    the tokenizer lacks.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # transformers says ValueError for files it cannot make sense of
        raise _unloadable(name, folder, "tokenizer", error) from error
    if conversational and tokenizer.chat_template is None:
        raise InvalidRequest(
            f"model {name} has no chat template, so rows of messages cannot be put to it: "
            "use an instruction-tuned model, or rows of plain text",
            param="model",
        )
    if tokenizer.eos_token is None:
        raise InvalidRequest(f"the tokenizer of model {name} has no end token: replies could not end", param="model")
    if tokenizer.pad_token is None:  # as TRL does; padding is masked, so the choice does not change the loss
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    folder: Path | None,
    *,
    scores: bool = False,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> "PreTrainedModel":
    """The base model in float32, the precision in which TRL keeps trained weights, from safetensors files only.

    With ``scores`` its head gives each sequence one number: a reward model's own, else a random one. Raises
    UnknownModel when it cannot be had, InvalidRequest as ``require_head``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder or name, trust_remote_code=trust_remote_code)
        require_head(name, config.architectures or [], labels=config.num_labels, scores=scores)
        if scores:
            config.num_labels = 1
        model = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
            folder or name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **({} if quantization is None else quantization.load_arguments()),
        )
    except (OSError, ValueError) as error:
        raise _unloadable(name, folder, "weights", error) from error
    # Also one that is stored quantized, whatever was asked for.
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return prepare(model)
    return model


def require_head(name: str, architectures: Sequence[str], *, labels: int, scores: bool) -> None:
    """Raises InvalidRequest for a model whose head is of another kind than the one that is trained.

    transformers would load it all the same, with a random head in the place of its own. ``labels`` are a classifier's.
    """
    classifiers = [kind for kind in architectures if kind.endswith("ForSequenceClassification")]
    if not classifiers:
        return
    if not scores:
        raise InvalidRequest(
            f"model {name} is a {classifiers[0]}, as reward models are, and writes no text: name a language model",
            param="model",
        )
    if labels != 1:
        raise InvalidRequest(
            f"model {name} is a {classifiers[0]} of {labels} labels, and a reward model has 1: name a language model, "
            "or a reward model",
            param="model",
        )


def _unloadable(name: str, folder: Path | None, part: str, error: Exception) -> UnknownModel:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.errors import RepositoryNotFoundError as NoSuchRepository

    causes = list(_causes(error))
    if any("trust_remote_code" in str(cause) for cause in causes):
        reason = (
            "it brings Python code of its own, which is not run here: use a model that transformers knows, or have "
            "the operator read the code and name the model in TRL_TRUST_REMOTE_CODE_MODELS"
        )
    elif folder is not None:
        reason = f"its folder in the models directory cannot be loaded: {_first_line(error)}"
    elif any(isinstance(cause, GatedRepoError) for cause in causes):
        reason = "the hub gives it only to accounts that accepted its terms: accept them and set HF_TOKEN"
    elif any(isinstance(cause, NoSuchRepository) for cause in causes):
        reason = "the hub has no such model, or it is private: check the name, or set HF_TOKEN"
    elif any(isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError) for cause in causes):
        reason = "it is not in the models directory and the hub cannot be reached: put it there, or allow the hub"
    else:
        reason = _first_line(error)
    return UnknownModel(f"the {part} of model {name} cannot be loaded: {reason}", param="model")


def _causes(error: BaseException | None) -> "list[BaseException]":
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
