"""Parquet as a stream of Arrow record batches: run as a script, with the file as stdin and the batches on stdout.

A process of its own, because a small Parquet file can decode to any size (one long value, named a million times), its
claims about itself need not be true, and what breaks the decoder must break neither the service nor its memory. It
imports pyarrow and the standard library only.

Batches have no more bytes than a row may have, or hold one row; one without rows stands for a row that is too long.
The last line of stderr is JSON: {} at the end of a file, else the code and the reason of the defect that ends it.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

ROWS_AT_ONCE = 16  # decoded at once: dictionaries let a small file hold many long values


class Task(NamedTuple):
    """What to read, as JSON in the only argument."""

    columns: list[str]  # of those that the file has, these are read
    row_bytes: int  # longest row, as Arrow holds it
    unpacked_bytes: int | None  # most that is read of all rows together
    memory_bytes: int | None  # what decoding may take


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    with os.fdopen(0, "rb", closefd=False) as file, os.fdopen(1, "wb", closefd=False) as batches:
        answer = send(file, batches, task)
    sys.stderr.write("\n" + json.dumps(answer))


def send(file: BinaryIO, batches: BinaryIO, task: Task) -> dict[str, Any]:
    """Write the file's batches; returns the defect that ends them, as code and reason, or nothing."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    if task.memory_bytes is not None:
        limit_memory(task.memory_bytes)
    try:
        with pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            known = [name for name in names if name in task.columns]
            if not known:
                return {"reason": f"has no known column; the Parquet file has {', '.join(names)[:400]}"}
            if repeated := {name for name in known if names.count(name) > 1}:
                return {"reason": f"has no clear columns: the Parquet file has {', '.join(repeated)} twice"}
            claimed = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
            if task.unpacked_bytes is not None and claimed > task.unpacked_bytes:
                return {"code": "too_long"}
            fields = [parquet.schema_arrow.field(name) for name in known]
            schema = pyarrow.schema([field.with_type(_decoded(field.type)) for field in fields])
            with pyarrow.ipc.new_stream(batches, schema) as stream:
                total = 0
                for encoded in parquet.iter_batches(ROWS_AT_ONCE, columns=known, use_threads=False):
                    batch = encoded if encoded.schema.types == schema.types else encoded.cast(schema)
                    total += batch.nbytes
                    if task.unpacked_bytes is not None and total > task.unpacked_bytes:
                        return {"code": "too_long"}
                    for part in _parts(batch, task.row_bytes):
                        stream.write_batch(part)
    except (pyarrow.ArrowMemoryError, MemoryError):
        return {"reason": f"takes more than {task.memory_bytes} bytes of memory to unpack: write smaller row groups"}
    except BrokenPipeError:
        return {}  # nobody wants more
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return {"reason": f"is where the Parquet file breaks: {str(error).partition(chr(10))[0][:400]}"}
    return {}


def _decoded(kind: Any) -> Any:
    """A pyarrow.DataType without the dictionaries that values share: a row has no size with them."""
    from pyarrow import field, large_list, list_, struct, types

    if types.is_dictionary(kind):
        return _decoded(kind.value_type)
    if types.is_struct(kind):
        return struct([kind.field(i).with_type(_decoded(kind.field(i).type)) for i in range(kind.num_fields)])
    if types.is_list(kind) or types.is_large_list(kind):
        item = field(kind.value_field.name, _decoded(kind.value_type), kind.value_field.nullable)
        return list_(item) if types.is_list(kind) else large_list(item)
    return kind


def _parts(batch: Any, row_bytes: int) -> Iterator[Any]:
    if _size(batch) <= row_bytes:
        yield batch
        return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        yield row if _size(row) <= row_bytes else row.slice(0, 0)


def _size(batch: Any) -> int:
    """Bytes of a batch, and a pointer for each item of a list: a null takes none in Arrow, and one in Python."""
    return batch.nbytes + 8 * sum(_items(column) for column in batch.columns)


def _items(array: Any) -> int:
    from pyarrow import types

    if types.is_struct(array.type):
        return sum(_items(array.field(i)) for i in range(array.type.num_fields))
    if types.is_list(array.type) or types.is_large_list(array.type) or types.is_map(array.type):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        items = array.values if not types.is_map(array.type) else array.items
        return last - first + _items(items.slice(first, last - first))
    return 0


def limit_memory(size: int) -> None:
    """Let this process have ``size`` bytes more than it has, where the system can say how many these are (Linux)."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size,) * 2)


if __name__ == "__main__":
    main()
