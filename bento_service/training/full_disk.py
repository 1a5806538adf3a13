"""Whether an error means that the disk is full: not every library says it as the system does."""

import errno

_NUMBERS = (errno.ENOSPC, errno.EDQUOT)

# Libraries written in Rust (safetensors, tokenizers) give the system's number in their message.
_RUST = tuple(f"(os error {number})" for number in _NUMBERS)

# PyTorch's writer says that a file could not be written, and never why. It is the disk most often; with another cause
# the job waits for somebody to look, too.
_PYTORCH = ("unexpected pos", "PytorchStreamWriter failed writing", "basic_ios::clear: iostream error")


def is_full_disk(error: BaseException) -> bool:
    """Of the error or of one that it came from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NUMBERS:
            return True
        text = str(cause)
        if any(number in text for number in _RUST):
            return True
        if isinstance(cause, RuntimeError) and any(words in text for words in _PYTORCH):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
