"""A succeeded job's metrics as files of the service, for ``result_files`` of the job.

They are made from the stored events, so that they outlive the run directory, and are files like all others.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from bento_service.errors import NotFound
from bento_service.files import FileStorage
from bento_service.jobs.job import JobEvent, StoredFile, result_file_id
from bento_service.jobs.store import Store

PURPOSE = "fine-tune-results"

# First columns of every row; the values follow under TRL's names. The job's id makes the bytes its own, so that
# deleting another job's file can never delete these.
_FIRST = ("job_id", "type", "step", "epoch", "created_at")

_PAGE = 500
_REPORTED = ("metrics", "evaluation")


def publish(store: Store, storage: FileStorage, job_id: str) -> list[StoredFile]:
    """Store the job's metrics as CSV and as JSON Lines: a row for each metrics event and each evaluation.

    A step that was made twice, before and after a crash, has the later one's row. Doing it again changes nothing.
    """
    newest: dict[tuple[str, int], int] = {}
    columns = dict.fromkeys(_FIRST)
    for event in _reported(store, job_id):
        newest[event.type, event.data["step"]] = event.seq
        columns.update(dict.fromkeys(_row(event)))

    def rows() -> Iterator[dict[str, Any]]:
        for event in _reported(store, job_id):
            if newest[event.type, event.data["step"]] == event.seq:
                yield _row(event)

    def as_csv(write: Callable[[str], object]) -> None:
        line = io.StringIO()
        writer = csv.DictWriter(line, list(columns), lineterminator="\n")
        writer.writeheader()
        for row in rows():
            writer.writerow(row)
            write(line.getvalue())
            line.seek(0)
            line.truncate()
        write(line.getvalue())

    def as_json_lines(write: Callable[[str], object]) -> None:
        for row in rows():
            write(json.dumps(row) + "\n")

    return [
        _store(store, storage, job_id, "csv", as_csv),
        _store(store, storage, job_id, "jsonl", as_json_lines),
    ]


def _store(
    store: Store, storage: FileStorage, job_id: str, form: str, writer: Callable[[Callable[[str], object]], None]
) -> StoredFile:
    file_id = result_file_id(job_id, form)
    try:
        return store.get_file(file_id)
    except NotFound:
        pass
    with storage.receive() as incoming:
        writer(lambda text: incoming.write(text.encode()))
        stored = incoming.commit()
    return store.add_file(
        StoredFile(
            id=file_id,
            filename=f"{job_id}-metrics.{form}",
            purpose=PURPOSE,
            bytes=stored.bytes,
            sha256=stored.sha256,
            created_at=time.time(),
        )
    )


def _reported(store: Store, job_id: str) -> Iterator[JobEvent]:
    after: str | None = None
    while True:
        page = store.list_events(job_id, after=after, limit=_PAGE, order="asc")
        yield from (event for event in page.data if event.type in _REPORTED)
        if not page.has_more:
            return
        after = page.data[-1].id


def _row(event: JobEvent) -> dict[str, Any]:
    first = {"job_id": event.job_id, "type": event.type, "created_at": event.created_at}
    values = {**first, **event.data}
    return {name: values.pop(name, None) for name in _FIRST} | values
