"""Which base models a job may name, decided when it is submitted, without loading anything."""

import re
from pathlib import Path

from bento_service.errors import UnknownModel
from bento_service.settings import Settings
from bento_service.training.models import find_model, local_models

HUB_TIMEOUT_SECONDS = 5.0

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LISTED = 10


class BaseModels:
    """Base models of this host: folders under ``settings.models_path`` first, then the Hugging Face hub."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.models_path
        self._use_hub = settings.hub_models

    def locate(self, name: str) -> Path | None:
        """The model's local folder; None when it is to be loaded from the hub by its name.

        Raises UnknownModel, with the local models and what to do, when it is in neither place or the hub cannot
        be asked within ``HUB_TIMEOUT_SECONDS``.
        """
        folder = find_model(name, self._path)
        if folder is not None:
            return folder
        if not self._use_hub:
            raise self._unknown(name, "this service does not use the Hugging Face hub (TRL_HUB_MODELS is false)")
        if not _HUB_NAME.fullmatch(name):
            raise self._unknown(name, "it is not a hub name of the form <org>/<name> either")
        self._require_on_hub(name)
        return None

    def local_names(self) -> list[str]:
        """Names of the models in the models folder: ``<org>/<name>`` and ``<name>``, sorted."""
        return local_models(self._path)

    def _require_on_hub(self, name: str) -> None:
        import httpx2  # the transport of huggingface_hub, whose errors it lets through
        from huggingface_hub import is_offline_mode, model_info, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if is_offline_mode():
            raise self._unknown(name, "the Hugging Face hub is switched off here (HF_HUB_OFFLINE)")
        try:
            model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        except GatedRepoError as error:
            raise self._unknown(name, "on the hub it needs a licence to be accepted and an HF_TOKEN") from error
        except RepositoryNotFoundError as error:
            raise self._unknown(name, "the Hugging Face hub has no such model, or it needs an HF_TOKEN") from error
        except HFValidationError as error:
            raise self._unknown(name, f"it is not a valid hub name: {error}") from error
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            reason = f"the Hugging Face hub could not be reached ({type(error).__name__})"
            raise self._unknown(name, reason) from error

    def _unknown(self, name: str, reason: str) -> UnknownModel:
        names = self.local_names()
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            known = f"It has: {', '.join(names[:_LISTED])}{more}."
        else:
            known = "It holds no models yet."
        return UnknownModel(
            f"Model {name!r} is not in the service's models folder {self._path}, and {reason}. {known} "
            f"Put the model's folder at {self._path}/<org>/<name>, or name one that is there.",
            param="model",
        )
