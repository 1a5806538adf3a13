"""How the end of an attempt is told."""

import errno

import pytest

from bento_service.errors import InvalidDataset, TrainingFailed, UnknownModel
from bento_service.training.__main__ import failure


def test_a_cause_the_user_can_mend_keeps_its_code_and_is_not_retried() -> None:
    outcome = failure(UnknownModel("no such model", param="model"), attempt=2)
    assert outcome.attempt == 2
    assert (outcome.status, outcome.code, outcome.message, outcome.param, outcome.retryable) == (
        "failed",
        "model_not_found",
        "no such model",
        "model",
        False,
    )
    assert failure(InvalidDataset("bad rows"), 1).code == "invalid_dataset"
    assert failure(TrainingFailed("loss is nan"), 1).code == "training_failed"


@pytest.mark.parametrize(
    ("error", "code", "retryable", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", True, "free space"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "disk_full",
            True,
            "os error 28",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "disk_full",
            True,
            "pos",
        ),
        (OSError(errno.EIO, "Input/output error"), "storage_error", True, "Input/output error"),
        (MemoryError(), "out_of_memory", False, "batch_size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out_of_memory",
            False,
            "batch_size",
        ),
        (ValueError("odd\n  second line"), "internal_error", False, "ValueError: odd second line"),
        (KeyError(), "internal_error", False, "KeyError"),
    ],
)
def test_other_causes_have_a_code_and_say_what_to_do(error: Exception, code: str, retryable: bool, says: str) -> None:
    outcome = failure(error, attempt=1)
    assert (outcome.code, outcome.retryable) == (code, retryable)
    assert says in (outcome.message or "")


def test_a_full_disk_is_known_also_as_the_cause_of_another_error() -> None:
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        finally:
            raise ValueError("the file is not whole")
    except ValueError as error:
        outcome = failure(error, attempt=1)
    assert (outcome.code, outcome.retryable) == ("disk_full", True)


@pytest.mark.parametrize(
    ("kind", "code", "retryable"),
    [("OutOfMemoryError", "out_of_memory", False), ("AcceleratorError", "device_error", True)],
)
def test_errors_of_a_gpu_are_known_by_the_names_of_their_kinds(kind: str, code: str, retryable: bool) -> None:
    # torch's own classes by name and module: importing torch takes seconds
    error = type(kind, (RuntimeError,), {"__module__": "torch"})("CUDA error")
    outcome = failure(error, 1)
    assert (outcome.code, outcome.retryable) == (code, retryable)
