"""Every error the service raises on purpose, in one tree.

    TrlRemoteError
    ├── InvalidRequest            the caller's input cannot be accepted
    │   ├── UnknownModel          no such base model on this host
    │   ├── InvalidDataset        rows that cannot be trained on; carries the report of the file
    │   │   └── RefusedConversation   a row that the model's chat template renders without a reply
    │   ├── ImportFailed          a URL that is allowed could not be read
    │   ├── ResourcesExceeded     asks for more than this host has; the message has both numbers
    │   └── TooLarge              an upload or a body over the limit; the message has the limit
    ├── NotFound                  no such job, file or checkpoint
    ├── NotReady                  it is being made: ask again soon
    ├── Conflict                  the request contradicts what is stored
    │   ├── ClientIdConflict      the client id belongs to a job with another body
    │   └── TransitionRefused     the job's state does not allow this
    ├── Forbidden                 the caller may not do this
    │   └── ImportRefused         a URL that the operator does not allow
    ├── Overloaded                try again later
    ├── TooManyJobs               the caller has as many open jobs as it may
    ├── InvalidSettings           the operator's settings cannot be used; a line for each
    ├── UnreadableRun             a run directory holds something that is not ours or was damaged
    └── TrainingFailed            raised inside the trainer for a cause the user can mend

Each message says what happened, to what, and what the caller can do.
"""

from collections.abc import Sequence

from bento_service.training.dataset_report import DatasetReport, RowProblem


class TrlRemoteError(Exception):
    """Root of the tree. ``code`` is stable and machine-readable; ``param`` names the request field."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(TrlRemoteError):
    code = "invalid_request"


class UnknownModel(InvalidRequest):
    code = "model_not_found"


class InvalidDataset(InvalidRequest):
    """``report`` says what is wrong with each row; None when it is not about rows."""

    code = "invalid_dataset"

    def __init__(self, message: str, *, param: str | None = None, report: DatasetReport | None = None) -> None:
        super().__init__(message, param=param)
        self.report = report

    @property
    def problems(self) -> tuple[RowProblem, ...]:
        """Every defect up to the reporting cap; ``report`` counts all of them."""
        return () if self.report is None else self.report.problems


class RefusedConversation(InvalidDataset):
    pass


class ResourcesExceeded(InvalidRequest):
    code = "resources_exceeded"


class TooLarge(InvalidRequest):
    code = "too_large"


class ImportFailed(InvalidRequest):
    code = "import_failed"


class NotFound(TrlRemoteError):
    code = "not_found"


class NotReady(TrlRemoteError):
    code = "not_ready"


class Conflict(TrlRemoteError):
    code = "conflict"


class ClientIdConflict(Conflict):
    code = "client_id_conflict"


class TransitionRefused(Conflict):
    code = "transition_refused"


class Forbidden(TrlRemoteError):
    code = "forbidden"


class ImportRefused(Forbidden):
    code = "import_refused"


class Overloaded(TrlRemoteError):
    code = "overloaded"


class TooManyJobs(TrlRemoteError):
    code = "too_many_open_jobs"


class InvalidSettings(TrlRemoteError):
    """``problems`` holds a line for each setting."""

    code = "invalid_settings"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class UnreadableRun(TrlRemoteError):
    code = "run_directory_unreadable"


class TrainingFailed(TrlRemoteError):
    code = "training_failed"
