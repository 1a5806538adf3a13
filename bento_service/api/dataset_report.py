"""The report of a data file as a body: in the answer to a check of it, and in an error about it."""

from typing import Self

from pydantic import BaseModel, Field

from bento_service.training.dataset_report import DatasetReport


class RowProblemBody(BaseModel):
    """One defect of one row of a data file."""

    row: int = Field(description="From 1: a line of JSON Lines; in other containers a row, without CSV's header.")
    field: str | None = Field(description="Dotted path inside the row; null for the whole row.")
    code: str = Field(description="Stable, machine-readable: missing, empty, not_json, duplicate, ...")
    message: str = Field(description="What is wrong, said of the field, or of the row.")
    value: str | None = Field(description="The offending value, shortened.")


class DatasetReportBody(BaseModel):
    """What a data file holds, and whether a job of the method can train on it."""

    valid: bool
    refusal: str | None = Field(description="Why a job of the method cannot train on the file; null when it can.")
    method: str = Field(description="The method that the file was checked for.")
    container: str | None = Field(description="jsonl, json, csv or parquet; null for an empty or unknown file.")
    gzipped: bool
    format: str | None = Field(description="The format that most rows have; null when no row has one.")
    formats: dict[str, int] = Field(description="Rows by format. The rows of a good file have one.")
    methods: list[str] = Field(description="The methods that can train on the format.")
    rows: int = Field(description="Rows found, good and bad.")
    bad_rows: int
    problems: list[RowProblemBody] = Field(description="The first ones, in the order of the rows.")
    total_problems: int = Field(description="All problems found; `problems` may list fewer.")
    counts: dict[str, int] = Field(description="All problems and warnings by code.")
    warnings: list[RowProblemBody] = Field(description="What is odd and no obstacle; the first ones.")
    total_warnings: int

    @classmethod
    def of(cls, report: DatasetReport) -> Self:
        return cls.model_validate(report.to_json())
