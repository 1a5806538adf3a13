"""The service's settings: one class, read from the environment with the prefix ``TRL_``."""

import socket
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


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

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="Accepted API keys, comma separated. None: only loopback callers are answered."
    )
    allow_anonymous: bool = Field(
        default=False, description="Answer callers from other hosts although no API key is set."
    )
    hub_models: bool = Field(default=True, description="Look for models on the Hugging Face hub when not local.")

    max_file_bytes: int = Field(default=5 * 2**30, ge=1, description="Largest accepted upload, bytes.")
    max_report_rows: int = Field(default=100, ge=1, description="Bad rows listed one by one in an answer.")

    max_streams: int = Field(default=100, ge=1, description="Event streams open at once in an API process.")

    heartbeat_seconds: float = Field(default=10, gt=0, description="How often a supervisor renews its leases.")
    lease_seconds: float = Field(default=30, gt=0, description="A lease not renewed for this long is stale.")
    trainer_command: str | None = Field(
        default=None,
        description="Command line that starts a trainer; the run directory and --attempt N are added to it. "
        "Default: this interpreter with -m bento_service.training.",
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
    def _split_keys(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value

    @field_validator("home", "models_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @property
    def models_path(self) -> Path:
        return self.models_dir or self.home / "models"

    @property
    def files_path(self) -> Path:
        return self.home / "files"

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
    """The settings of this process, read from its environment once."""
    return Settings()
