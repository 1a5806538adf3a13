"""Where a dataset's rows are, told from how it was registered, and which way they get to the service."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from .errors import NotFound, RequestRefused

SERVICE_FILE_ID = re.compile(r"file-[A-Za-z0-9_-]+")
# What the service reads; it tells the kinds apart by content. An operator's files of other kinds are not sent to it.
FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# What Llama Stack's datasetio fetches over HTTP (localfs: llama_stack.providers.utils.datasetio.url_utils).
TABLE_ENDINGS = (".csv", ".xlsx")
READABLE = (
    "rows; paths and file:// URIs of .jsonl, .json, .csv and .parquet files (also .gz) and of .xlsx tables on the "
    "stack's host; data: URIs; http(s):// tables; and what the training service is allowed to import"
)


@dataclass(frozen=True)
class ServiceFile:
    """A file that was uploaded to the service."""

    file_id: str


@dataclass(frozen=True)
class Rows:
    """Rows that Llama Stack holds itself."""

    rows: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class LocalFile:
    """A file on the stack's host, sent as it is."""

    path: Path


@dataclass(frozen=True)
class Inline:
    """The content of a data: URI."""

    content: bytes


@dataclass(frozen=True)
class Table:
    """What datasetio reads; where that fails, the service may be asked to fetch ``uri``."""

    uri: str
    importable: bool


@dataclass(frozen=True)
class Remote:
    """What only the service may fetch."""

    uri: str


Source = ServiceFile | Rows | LocalFile | Inline | Table | Remote


def source_of(dataset_id: str, dataset: Any | None, *, tables: bool, folders: Sequence[str] | None) -> Source:
    """``dataset`` is what the stack has registered under this id, if anything; ``tables`` says whether the stack has
    a datasetio; ``folders`` are those that local files may lie in, None: any.

    Raises NotFound for an id that names nothing, RequestRefused for a URI that nobody can read.
    """
    if dataset is None:
        if SERVICE_FILE_ID.fullmatch(dataset_id):
            return ServiceFile(dataset_id)
        if "://" in dataset_id or dataset_id.startswith("data:"):
            return _uri(dataset_id, dataset_id, tables=False, folders=folders)
        raise NotFound(
            f"Dataset '{shortened(dataset_id)}' is not registered with this Llama Stack: register it, or name the id "
            "of a file uploaded to the training service (file-...), or a URI"
        )
    if dataset.source.type == "rows":
        return Rows(dataset.source.rows)
    return _uri(dataset_id, dataset.source.uri, tables=tables, folders=folders)


def _uri(dataset_id: str, uri: str, *, tables: bool, folders: Sequence[str] | None) -> Source:
    scheme = uri.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) else ""
    match scheme:
        case "" | "file":
            return _local(dataset_id, uri, tables=tables, folders=folders)
        case "data":
            return Inline(_inline(dataset_id, uri))
        case "http" | "https":
            if tables and urlsplit(uri).path.lower().endswith(TABLE_ENDINGS):
                return Table(uri, importable=True)
            return Remote(uri)
        case "huggingface":
            return Table(uri, importable=True) if tables else Remote(uri)
        case "lsfs":
            raise RequestRefused(
                f"Dataset '{dataset_id}': {shortened(uri)} is a file of Llama Stack's files API, which its datasetio "
                "does not read: upload it to the training service and name its id there, or register the rows"
            )
        case _:
            raise refused(dataset_id, uri)


def _local(dataset_id: str, uri: str, *, tables: bool, folders: Sequence[str] | None) -> Source:
    if uri.lower().startswith("file:"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise refused(dataset_id, uri)
        path = Path(unquote(parts.path))
    else:
        # No urlsplit for a plain path: '#' and '?' are part of a file's name.
        path = Path(uri).absolute()
    if folders is not None and not any(path.resolve().is_relative_to(Path(folder).resolve()) for folder in folders):
        raise RequestRefused(
            f"Dataset '{dataset_id}': {path} is in none of the provider's local_folders: use one of them "
            f"({', '.join(folders) or 'there are none'}), or register the rows"
        )
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(FILE_ENDINGS):
        return LocalFile(path)
    if tables and name.endswith(TABLE_ENDINGS):
        return Table(uri, importable=False)
    raise refused(dataset_id, uri)


def _inline(dataset_id: str, uri: str) -> bytes:
    """RFC 2397."""
    head, comma, content = uri.partition(",")
    if not comma:
        raise RequestRefused(f"Dataset '{dataset_id}': the data: URI has no comma before its content")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(unquote(content), validate=True)
    except binascii.Error as error:
        raise RequestRefused(f"Dataset '{dataset_id}': the data: URI is not valid base64: {error}") from error


def refused(dataset_id: str, uri: str, why: str = "") -> RequestRefused:
    return RequestRefused(
        f"Dataset '{shortened(dataset_id)}': the URI {shortened(uri)!r} cannot be read{why}. What works: {READABLE}"
    )


def shortened(uri: str) -> str:
    return uri if len(uri) <= 100 else f"{uri[:100]}..."
