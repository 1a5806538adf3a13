"""The core object on a real store and real files, with data and a model folder that submitting accepts."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bento_service.files import FileStorage
from bento_service.jobs.job import JobRequest, StoredFile
from bento_service.jobs.store import Store
from bento_service.post_training import TrlPostTrainingImpl
from bento_service.settings import Settings
from bento_service.training.spec import TrlOptions

MODEL = "org/tiny"

PAIRS: tuple[dict[str, Any], ...] = (
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "I do not know."},
    {"prompt": "Name a prime number.", "chosen": "Seven.", "rejected": "Eight."},
)


@contextmanager
def core(home: Path, **settings: Any) -> Iterator[TrlPostTrainingImpl]:
    """The core object with its state under ``home``, and a folder for ``MODEL``; nothing claims its jobs."""
    chosen = Settings(**({"home": home, "device": "cpu"} | settings))
    folder = chosen.models_path / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    store = Store.open(chosen.sqlalchemy_url)
    try:
        yield TrlPostTrainingImpl(chosen, store, FileStorage(chosen.files_path, chosen.max_file_bytes))
    finally:
        store.close()


def json_lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(impl: TrlPostTrainingImpl, rows: Sequence[Any] = PAIRS) -> StoredFile:
    return impl.upload(io.BytesIO(json_lines(rows)), filename="pairs.jsonl")


def request(training_file: str, *, options: dict[str, Any] | None = None, **changes: Any) -> JobRequest:
    trl = TrlOptions.model_validate(options or {})
    return JobRequest(**({"model": MODEL, "training_file": training_file, "options": trl} | changes))
