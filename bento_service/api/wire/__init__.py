"""What goes over the wire, in the shapes of OpenAI's API, and plain conversions to the domain objects.

Times are whole unix seconds. Everything that OpenAI's API does not have is under one key, ``trl``.
"""

from bento_service.api.wire.base import ListOf, Strict, page_of
from bento_service.api.wire.checkpoints import CheckpointObject
from bento_service.api.wire.files import FileDeleted, FileObject
from bento_service.api.wire.health import Health
from bento_service.api.wire.history import AttemptObject, EventObject, LogObject
from bento_service.api.wire.jobs import CreateJob, JobObject
from bento_service.api.wire.methods import DpoHyperparameters, DpoMethod, Method
from bento_service.api.wire.models import ModelDeleted, ModelList, ModelObject

__all__ = [
    "AttemptObject",
    "CheckpointObject",
    "CreateJob",
    "DpoHyperparameters",
    "DpoMethod",
    "EventObject",
    "FileDeleted",
    "FileObject",
    "Health",
    "JobObject",
    "ListOf",
    "LogObject",
    "Method",
    "ModelDeleted",
    "ModelList",
    "ModelObject",
    "Strict",
    "page_of",
]
