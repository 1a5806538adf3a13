"""Rows of Parquet as a stream, decoded by ``parquet_process``."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from bento_service.training import parquet_process, row_bounds
from bento_service.training.dataset_report import ABSENT, Defect, Row
from bento_service.training.row_bounds import Bounds, NumberedRow, Unreadable

MAGIC = b"PAR1"  # the first bytes of a file, and its last

# All that the decoding process gets of the environment; it reads what strangers send.
ENVIRONMENT = (
    "PATH",
    "HOME",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "LANG",
)


def parquet_rows(file: BinaryIO, columns: Collection[str], bounds: Bounds, *, gzipped: bool) -> Iterator[NumberedRow]:
    import pyarrow  # type: ignore[import-untyped]

    with ExitStack() as stack:
        if gzipped:  # Parquet is read from its end, so it is unpacked to a temporary file
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, row_bounds.CHUNK_BYTES)
            file = cast(BinaryIO, unpacked)
        _require_end(file)
        process, errors = stack.enter_context(_decoding(file, columns, bounds))
        number = 0
        broken: pyarrow.ArrowException | OSError | None = None
        try:
            for batch in pyarrow.ipc.open_stream(process.stdout):
                for row in _batch_rows(batch, bounds):
                    number += 1
                    bounds.require_number(number)
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            broken = error  # the process ended early, and says why
        process.wait()
        errors.seek(0)
        verdict = _verdict(process.returncode, errors.read().decode("utf-8", "replace"))
        if verdict.get("code") == "too_long":
            raise bounds.unpacks_to_more()
        if verdict:
            raise Unreadable(verdict["reason"])
        if broken is not None:
            raise broken


def _require_end(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(MAGIC)))
    if file.read() != MAGIC or size < 3 * len(MAGIC):
        raise Unreadable("is where the Parquet file breaks: it does not end as one, as if it were cut off")
    file.seek(0)


@contextmanager
def _decoding(
    file: BinaryIO, columns: Collection[str], bounds: Bounds
) -> Iterator[tuple[subprocess.Popen[bytes], BinaryIO]]:
    """The process and the file of its stderr; it is ended with the context."""
    task = parquet_process.Task(
        columns=list(columns),
        row_bytes=bounds.row_bytes,
        unpacked_bytes=bounds.unpacked_bytes,
        memory_bytes=bounds.parquet_bytes,
    )
    # By its path and without its folder in sys.path: it needs nothing of this package. Arrow's own memory pools
    # reserve more than they use, which a limit cannot tell apart.
    command = [sys.executable, "-P", str(Path(parquet_process.__file__)), json.dumps(task._asdict())]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        try:
            yield process, cast(BinaryIO, errors)
        finally:
            process.kill()


def _verdict(code: int, said: str) -> dict[str, str]:
    """What ended the process, empty for the file's end. ``said`` is its stderr."""
    try:
        verdict = json.loads(said.rpartition("\n")[2])
    except ValueError:
        verdict = None
    if code == 0 and isinstance(verdict, dict):
        return verdict
    how = f"signal {-code}" if code < 0 else f"code {code}"
    last = said.strip().rpartition("\n")[2][:200]
    return {"reason": f"cannot be decoded: the Parquet decoder ended with {how}" + (f": {last}" if last else "")}


def _batch_rows(batch: Any, bounds: Bounds) -> Iterator[Row | Defect]:
    """The rows of a pyarrow.RecordBatch."""
    if batch.num_rows == 0:
        yield bounds.too_long()
        return
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError among them
        rows = [_batch_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, Defect) else {name: value for name, value in row.items() if value is not None}


def _batch_row(row: Any) -> Row | Defect:
    try:
        return cast(Row, row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Defect("not_utf8", None, f"is not UTF-8 at byte {error.start} of a value")
    except (ValueError, OverflowError) as error:  # times that Python cannot hold, two fields of one name
        return Defect("wrong_type", None, f"holds a value that cannot be read: {error}", ABSENT)
