"""Every error the adapter raises on purpose, and the status code that Llama Stack answers with.

    AdapterError
    ├── RequestRefused       400  the request cannot be carried out as it is
    ├── NotFound             404  no such job, or something the service does not have
    ├── Conflict             409  the job_uuid is taken, or the job's state does not allow this
    ├── NotSupported         501  this provider does not do that
    └── ServiceUnavailable   502  the training service cannot be reached, fails, or refuses the adapter's key

Each message says what happened, where, and what to do.
"""

from . import compat


class AdapterError(compat.AnsweredError):
    """Root of the tree. The stack answers with ``status_code`` and the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class RequestRefused(AdapterError, ValueError):
    status_code = 400


class NotFound(AdapterError):
    status_code = 404


class Conflict(AdapterError):
    status_code = 409


class NotSupported(AdapterError, NotImplementedError):
    status_code = 501


class ServiceUnavailable(AdapterError):
    status_code = 502
