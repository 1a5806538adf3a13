"""The service's settings: one class, read from the environment with the prefix ``TRL_``."""

import difflib
import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bento_service.api_keys import ApiKey, parse_api_keys
from bento_service.errors import InvalidSettings
from bento_service.training.row_bounds import ROW_BYTES, ROWS, Bounds
from bento_service.url_import.allowlist import UrlPattern, parse_private_host

PREFIX = "TRL_"

# Variables with our prefix that are read by others: by run_remote.yaml, and by the library TRL.
FOREIGN_VARIABLES = frozenset(
    {"TRL_SERVICE_URL", "TRL_SERVICE_API_KEY", "TRL_PROVIDERS_DIR", "TRL_EXPERIMENTAL_SILENCE"}
)

# What Kubernetes sets in every pod beside a Service whose name starts with "trl-".
_SERVICE_LINK = re.compile(r"TRL_\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


class Settings(BaseSettings):
    """Operator settings. Relative paths are resolved once, against the directory of the first reader.

    Raises pydantic.ValidationError for a value out of range.
    """

    model_config = SettingsConfigDict(env_prefix="TRL_", extra="ignore", frozen=True)

    home: Path = Field(
        default=Path("~/.trl-remote"), description="All state: database, uploaded files, run directories."
    )
    models_dir: Path | None = Field(
        default=None,
        description="Where base models are looked for before the hub, as <org>/<name>. Default: TRL_HOME/models.",
    )
    database_url: SecretStr | None = Field(
        default=None, description="SQLAlchemy URL. Default: SQLite in TRL_HOME/trl-remote.db."
    )
    host: str = Field(default="127.0.0.1", description="Address that `make serve` and service.py bind.")
    port: int = Field(default=8080, ge=1, le=65535, description="Port of the service.")
    device: Literal["auto", "cuda", "cpu", "mps"] = Field(default="auto", description="Where trainers run.")
    host_name: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9_.-]{1,200}$",
        description="Name of this host in leases and attempts. Give each host that shares a TRL_HOME its own.",
    )
    cpu_slots: int = Field(default=1, ge=1, description="Jobs that train at once on a host without GPUs.")

    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = Field(
        default=(),
        description="Accepted API keys, NAME:KEY or KEY, comma separated, or a JSON object of names and keys. "
        "None: only loopback callers are answered.",
    )
    allow_anonymous: bool = Field(
        default=False, description="Answer callers from other hosts although no API key is set."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins whose web pages may use the API from a browser, comma separated."
    )
    hub_models: bool = Field(default=True, description="Look for models on the Hugging Face hub when not local.")

    trust_remote_code_models: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Base models, <org>/<name>, whose own Python code trainers may run, comma separated. Only for "
        "code that you have read.",
    )

    max_file_bytes: int = Field(default=5 * 2**30, ge=1, description="Largest accepted upload, bytes.")
    max_uploads: int = Field(default=64, ge=1, description="Uploads and imports at once in an API process.")
    body_idle_seconds: float = Field(
        default=30, gt=0, description="A request's body that sends nothing for this long is given up."
    )
    body_bytes_per_second: float = Field(
        default=256, ge=0, description="A body slower than this, once body_idle_seconds have passed, is given up."
    )
    import_urls: Annotated[tuple[UrlPattern, ...], NoDecode] = Field(
        default=(),
        description="Where files may be imported from, scheme://host[:port][/path], comma separated. "
        "None: no imports.",
    )
    import_private_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Hosts of import_urls that may have private addresses, comma separated."
    )
    import_seconds: float = Field(default=600, gt=0, description="Longest time of one import.")
    max_row_bytes: int = Field(
        default=ROW_BYTES,
        ge=1024,
        description="Longest row of a data file, bytes; one is held in memory whole.",
    )
    max_rows: int = Field(default=ROWS, ge=1, description="Most rows of a data file.")
    max_report_rows: int = Field(default=100, ge=1, description="Bad rows listed one by one in an answer.")

    max_validations: int = Field(default=1, ge=1, description="Validations that read data at once in an API process.")
    validate_seconds: float = Field(
        default=60, gt=0, description="Time in which a validation tokenizes; larger files are answered from a sample."
    )

    max_streams: int = Field(default=100, ge=1, description="Event streams open at once in an API process.")

    max_open_jobs: int = Field(default=10_000, ge=1, description="Jobs that have not ended, in all.")
    max_open_jobs_per_key: int = Field(
        default=1000, ge=1, description="Jobs that have not ended, per API key; callers without a key count as one."
    )

    heartbeat_seconds: float = Field(default=10, gt=0, description="How often a supervisor renews its leases.")
    lease_seconds: float = Field(default=30, gt=0, description="A lease not renewed for this long is stale.")
    trainer_command: str | None = Field(
        default=None,
        description="Command line that starts a trainer; the run directory and --attempt N are added to it. "
        "Default: this interpreter with -m bento_service.training.",
    )
    warm_trainers: int = Field(
        default=1,
        ge=0,
        description="Trainer processes kept ready, with everything imported, for the next jobs: each takes 0.8 GB of "
        "memory and saves a job the seconds that imports take. 0: none. trainer_command: none.",
    )
    poll_seconds: float = Field(default=0.25, gt=0, description="How often the supervisor looks for work.")
    grace_seconds: float = Field(
        default=30, ge=0, description="Time a trainer has to checkpoint after SIGTERM before SIGKILL."
    )
    max_run_seconds: float | None = Field(
        default=None, gt=0, description="Longest running time of any job, over all its attempts."
    )
    idle_warn_seconds: float = Field(
        default=1800, gt=0, description="A trainer that reported nothing for this long gets a warning event."
    )
    idle_stop_seconds: float | None = Field(
        default=None, gt=0, description="A trainer that reported nothing for this long is stopped and retried."
    )
    max_log_bytes: int = Field(
        default=50 * 2**20, ge=1024, description="A trainer's log is rotated at this size; one old part is kept."
    )
    retention_days: float | None = Field(
        default=None,
        ge=0,
        description="Run directories (checkpoints, logs) of jobs that ended this long ago are deleted. "
        "Default: never. Jobs, events and metrics are kept.",
    )
    max_attempts: int = Field(default=3, ge=1, description="Launches of one job before it is given up.")
    retry_backoff_seconds: float = Field(
        default=5, ge=0, description="Wait before the second attempt; doubles for each further one."
    )

    @field_validator("api_keys", mode="before")
    @classmethod
    def _parse_keys(cls, value: object) -> object:
        return parse_api_keys(value) if isinstance(value, str) else value

    @field_validator("import_urls", mode="before")
    @classmethod
    def _parse_patterns(cls, value: object) -> object:
        return tuple(map(UrlPattern.parse, _entries(value))) if isinstance(value, str) else value

    @field_validator("import_private_hosts", mode="before")
    @classmethod
    def _parse_hosts(cls, value: object) -> object:
        return tuple(map(parse_private_host, _entries(value))) if isinstance(value, str) else value

    @field_validator("trust_remote_code_models", mode="before")
    @classmethod
    def _parse_models(cls, value: object) -> object:
        return tuple(map(_model, _entries(value))) if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _parse_origins(cls, value: object) -> object:
        return tuple(map(_origin, _entries(value))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _any_origin_needs_keys(self) -> Self:
        if "*" in self.cors_origins and not self.api_keys:
            raise ValueError("TRL_CORS_ORIGINS=* needs TRL_API_KEYS: else any page a browser shows could use the API")
        return self

    @field_validator("database_url", mode="after")
    @classmethod
    def _is_database(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            # Not above: BentoML's arbiter reads settings too, and starts the worker only after that.
            from sqlalchemy.engine import make_url
            from sqlalchemy.exc import ArgumentError

            try:
                make_url(value.get_secret_value())
            except (ArgumentError, ValueError):  # neither is told on: both quote the URL and its password
                raise ValueError("not a SQLAlchemy URL such as postgresql://user:password@host/database") from None
        return value

    @field_validator("home", "models_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @property
    def models_path(self) -> Path:
        return self.models_dir or self.home / "models"

    @property
    def row_bounds(self) -> Bounds:
        """What is read of a data file. What a compressed one unpacks to is bound as an upload is."""
        return Bounds(row_bytes=self.max_row_bytes, rows=self.max_rows, unpacked_bytes=self.max_file_bytes)

    @property
    def files_path(self) -> Path:
        return self.home / "files"

    @property
    def reference_cache_path(self) -> Path:
        """Log-probabilities of reference models that jobs share; may be deleted while no job runs."""
        return self.home / "cache" / "reference"

    @property
    def runs_path(self) -> Path:
        return self.home / "runs"

    @property
    def sqlalchemy_url(self) -> str:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home / 'trl-remote.db'}"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read from its environment once.

    Raises InvalidSettings, with a line for each variable that is misspelt or whose value cannot be used.
    """
    problems = list(_unknown_variables(os.environ))
    try:
        settings = Settings()
    except ValidationError as error:
        problems += [_problem(problem) for problem in error.errors(include_url=False)]
    if problems:
        raise InvalidSettings(problems)
    return settings


def _unknown_variables(environment: Mapping[str, str]) -> Iterable[str]:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(environment):
        # Settings are read without regard to case.
        if not name.upper().startswith(PREFIX) or name.upper() in known | FOREIGN_VARIABLES:
            continue
        if _SERVICE_LINK.fullmatch(name):
            continue
        close = difflib.get_close_matches(name.upper(), known, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else "unset it; docs/configuration.md lists the settings there are."
        )
        yield f"{name}: there is no such setting: {hint}"


def _problem(problem: Mapping[str, Any]) -> str:
    """One error of pydantic's as a line. The value is quoted unless it may be a secret."""
    field = str(problem["loc"][0]) if problem["loc"] else ""
    message = problem["msg"].removeprefix("Value error, ")
    if not field:  # of several settings together; the message names them
        return str(message)
    name = PREFIX + field.upper()
    value = problem["input"]
    shown = f"{value[:100]!r}: " if isinstance(value, str) and field not in _SECRET_FIELDS else ""
    return f"{name}: {shown}{message[:1].lower()}{message[1:]}"


def _entries(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _model(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise ValueError(f"{text!r} is not a model's name, <org>/<name>: each model is named, there is no pattern")
    return text


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or text != f"{parts.scheme}://{parts.netloc}"):
        raise ValueError(f"{text!r} is not an origin such as https://app.example.org, without a path; * is any")
    return text.lower()


_SECRET_FIELDS = frozenset({"api_keys", "database_url"})
