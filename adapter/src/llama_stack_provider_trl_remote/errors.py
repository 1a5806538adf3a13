"""Every error the adapter raises on purpose, and the status code that Llama Stack gives it.

    AdapterError
    ├── RequestRefused       400  the request cannot be carried out as it is
    ├── NotFound             404  no such job, or something the service does not have
    ├── Conflict             409  the job_uuid is taken, or the job's state does not allow this
    └── ServiceUnavailable   502  the training service cannot be reached, fails, or refuses the adapter's key

Each message says what happened, where, and what to do.
"""

from . import compat


class AdapterError(Exception):
    """Root of the tree."""

    def __init__(self, message: str) -> None:
        # Not super().__init__: the stack's not-found class would build a message of its own.
        Exception.__init__(self, message)


class RequestRefused(AdapterError, ValueError):
    """The stack answers 400 to every ValueError."""

    status_code = 400


class NotFound(AdapterError, compat.ResourceNotFoundError):
    """Derives from the stack's class, which it answers with 404."""


class Conflict(AdapterError, compat.ConflictError):
    """Derives from the stack's class, which it answers with 409."""


class ServiceUnavailable(AdapterError):
    """The stack answers with ``status_code``."""

    status_code = 502
