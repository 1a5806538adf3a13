"""Reading a multipart upload as it arrives: the file's bytes go straight to the storage, never into memory."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio import CapacityLimiter, to_thread
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from bento_service.errors import InvalidRequest, Overloaded
from bento_service.files import IncomingFile

# Small fields, such as purpose; far more than any of them needs.
MAX_FIELD_BYTES = 16 * 1024
MAX_PARTS = 16
# An import takes a thread for as long as the other side likes; these are not those of the other routes.
IMPORTERS = 8
# Bytes collected before they are handed to the thread that writes them.
BLOCK_BYTES = 1 << 20


class Uploads:
    """The uploads and imports that one API process takes at once; ``importers`` are the threads of the imports."""

    def __init__(self) -> None:
        self._open = 0
        self.importers = CapacityLimiter(IMPORTERS)

    @contextmanager
    def place(self, limit: int) -> Iterator[None]:
        """Raises Overloaded when ``limit`` are open already."""
        if self._open >= limit:
            raise Overloaded(
                f"{limit} files are being uploaded to this service, and it takes no more at once "
                "(TRL_MAX_UPLOADS): try again later."
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


@dataclass
class _Part:
    name: str
    filename: str | None
    data: bytearray = field(default_factory=bytearray)


class UploadForm:
    """A form with one file, in the part ``file``, and small text fields.

    ``read`` writes the file's bytes to ``incoming``; afterwards ``filename`` and ``fields`` hold the rest.
    """

    def __init__(self, content_type: str, incoming: IncomingFile) -> None:
        """Raises InvalidRequest when the body is not declared as multipart/form-data."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequest(
                f"POST /v1/files takes multipart/form-data with a boundary, not {content_type!r}: "
                "send the parts file and purpose."
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._incoming = incoming
        self._block = bytearray()
        self._part: _Part | None = None
        self._parts = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._part_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def read(self, body: AsyncIterator[bytes]) -> None:
        """Consume the whole body. Raises InvalidRequest when it is malformed, TooLarge as the storage does."""
        try:
            async for chunk in body:
                self._parser.write(chunk)
                if len(self._block) >= BLOCK_BYTES:
                    await self._flush()
            self._parser.finalize()
        except MultipartParseError as error:
            raise InvalidRequest(f"The multipart body is malformed: {error}.") from error
        if not self._ended:
            raise InvalidRequest("The multipart body ended before its closing boundary: was the upload cut off?")
        await self._flush()
        if self.filename is None:
            raise InvalidRequest("The form has no file: send the data as the part 'file'.", param="file")

    async def _flush(self) -> None:
        block, self._block = bytes(self._block), bytearray()
        if block:
            await to_thread.run_sync(self._incoming.write, block)

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts: send file and purpose only.")
        self._headers = {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _end_headers(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or b"name" not in options:
            raise InvalidRequest("A part of the form has no name: each needs Content-Disposition: form-data; name=...")
        name = options[b"name"].decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._part = _Part(name, None if filename is None else filename.decode("utf-8", "replace"))
        if name == "file":
            if self.filename is not None:
                raise InvalidRequest("The form has two parts named file: upload one file at a time.", param="file")
            self.filename = self._part.filename or "upload.jsonl"
        elif filename is not None:
            raise InvalidRequest(f"The form has a file named {name!r}: send the data as the part 'file'.", param=name)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        if self._part.name == "file":
            self._block += data[start:end]
            return
        self._part.data += data[start:end]
        if len(self._part.data) > MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"The field {self._part.name!r} is longer than {MAX_FIELD_BYTES} bytes.", param=self._part.name
            )

    def _end_part(self) -> None:
        assert self._part is not None
        if self._part.name != "file":
            self.fields[self._part.name] = self._part.data.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True
