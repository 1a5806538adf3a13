"""The trainer's log file, kept small without the trainer's help.

The trainer writes its standard output straight into the file, so that no reader can ever block it; the supervisor
moves what is too much aside.
"""

import os
from pathlib import Path

_PART_BYTES = 1 << 20


def rotate(log: Path, max_bytes: int) -> bool:
    """Move the log's content to ``<name>.1`` when it is larger than ``max_bytes``; True when it was.

    The trainer holds the file open in append mode, so it is emptied and not renamed. Lines written between copy
    and truncation are lost; events are not kept here.
    """
    if not log.exists() or log.stat().st_size <= max_bytes:
        return False
    with log.open("rb") as source, log.with_name(log.name + ".1").open("wb") as old:
        source.seek(-max_bytes, os.SEEK_END)
        left = max_bytes  # the trainer may be writing faster than this reads
        while left and (part := source.read(min(left, _PART_BYTES))):
            old.write(part)
            left -= len(part)
    os.truncate(log, 0)
    return True
