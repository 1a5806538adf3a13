"""Uploaded files, in the shapes of OpenAI's files API."""

from typing import Literal

from pydantic import BaseModel, Field

from bento_service.jobs.job import StoredFile


class TrlFile(BaseModel):
    """What OpenAI's file object has no place for."""

    sha256: str = Field(description="Of the bytes, in hex.")


class FileObject(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = Field(
        default="processed", description="It is on disk. Its rows are checked when a job is submitted."
    )
    status_details: None = Field(default=None, description="For compatibility: always null.")
    expires_at: None = Field(default=None, description="For compatibility: files stay until they are deleted.")
    trl: TrlFile

    @classmethod
    def of(cls, file: StoredFile) -> "FileObject":
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=int(file.created_at),
            filename=file.filename,
            purpose=file.purpose,
            trl=TrlFile(sha256=file.sha256),
        )


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
