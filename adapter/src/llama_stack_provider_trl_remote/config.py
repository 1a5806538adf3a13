"""What an operator sets under ``config:`` of the provider in run_remote.yaml."""

import ssl
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections: a misspelt key stops the stack's start instead of being ignored."""

    model_config = ConfigDict(extra="forbid")


class Timeouts(Section):
    """Seconds."""

    connect_seconds: float = Field(default=5, gt=0, description="To open a connection to the service.")
    read_seconds: float = Field(default=60, gt=0, description="Between two parts of an answer.")
    write_seconds: float = Field(default=60, gt=0, description="Between two parts of an upload.")
    submit_seconds: float = Field(
        default=600, gt=0, description="A whole submit: reading the dataset, uploading it, creating the job."
    )


class Tls(Section):
    """For a base_url with https."""

    ca_file: str | None = Field(
        default=None, description="Certificates (PEM) to trust instead of the system's, such as a private CA's."
    )
    client_cert_file: str | None = Field(default=None, description="The adapter's own certificate (PEM).")
    client_key_file: str | None = Field(default=None, description="Its key, where it is not in the same file.")
    verify: bool = Field(default=True, description="False: trust any certificate; only for trying things out.")

    @model_validator(mode="after")
    def _readable(self) -> "Tls":
        """A bad file stops the stack's start, not the first job."""
        if self.client_key_file is not None and self.client_cert_file is None:
            raise ValueError("tls.client_key_file needs tls.client_cert_file")
        self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """Raises ValueError naming the file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ValueError(f"tls.ca_file {self.ca_file} cannot be used: {error}") from error
        if self.client_cert_file is not None:
            try:
                context.load_cert_chain(self.client_cert_file, self.client_key_file)
            except OSError as error:
                raise ValueError(f"tls.client_cert_file {self.client_cert_file} cannot be used: {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class Retries(Section):
    """Of requests that are safe to repeat: on connection errors and the answers 429, 502, 503 and 504."""

    attempts: int = Field(default=3, ge=1, description="Requests sent in all before giving up; 1 is no retry.")
    initial_backoff_seconds: float = Field(
        default=0.25, ge=0, description="Wait before the first retry; doubles for each further one, with jitter."
    )
    max_backoff_seconds: float = Field(
        default=8, ge=0, description="Longest wait, also where the service asks for a longer one with Retry-After."
    )


class LoraDefaults(Section):
    """LoRA adapter of jobs that say nothing of their own. Unset: the service's default."""

    rank: int | None = Field(default=None, ge=1, description="Rank of the update matrices.")
    alpha: float | None = Field(default=None, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="Dropout before the adapter, a probability.")
    target_modules: Literal["all-linear"] | list[str] | None = Field(
        default=None, description="Names of the adapted modules, or all-linear."
    )
    use_dora: bool | None = Field(default=None, description="Weight-decomposed LoRA (DoRA).")


class TrainingDefaults(Section):
    """Used where a request says nothing; the request wins. Unset: the service's default."""

    device: Literal["auto", "cuda", "cpu", "mps"] = Field(
        default="auto",
        description="Where jobs have to train. The service chooses its device itself; any value but auto is compared "
        "with the device it reports, and jobs are refused when it is another one.",
    )
    dpo_beta: float | None = Field(default=None, gt=0, description="Beta of DPO where the request gives none.")
    dpo_loss_type: str | list[str] | None = Field(
        default=None, description="DPO loss, or several summed, where the request gives none."
    )
    tuning: Literal["lora", "full"] | None = Field(default=None, description="Train an adapter or all weights.")
    lora: LoraDefaults = LoraDefaults()
    max_length: int | None = Field(default=None, ge=2, description="Tokens of prompt plus reply.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = Field(
        default=None, description="Precision where the request sends no dtype."
    )
    gradient_checkpointing: bool | None = Field(default=None, description="Recompute activations: less memory.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Any other of the service's TRL options, by their names there."
    )

    def trl_options(self, method: Literal["dpo", "supervised"]) -> dict[str, Any]:
        """The defaults for jobs of ``method`` as the service's ``trl`` object, with only what is set."""
        named: dict[str, Any] = self.model_dump(
            include={"tuning", "max_length", "precision", "gradient_checkpointing"}, exclude_none=True
        )
        if lora := self.lora.model_dump(exclude_none=True):
            named["lora"] = lora
        if method == "dpo" and self.dpo_loss_type is not None:
            losses = [self.dpo_loss_type] if isinstance(self.dpo_loss_type, str) else self.dpo_loss_type
            named["dpo"] = {"loss_type": losses}
        # The service refuses options of another method.
        foreign = {"dpo", "sft"} - {"dpo" if method == "dpo" else "sft"}
        return merged({key: value for key, value in self.options.items() if key not in foreign}, named)


class TrlRemoteConfig(Section):
    """The provider's configuration."""

    base_url: str = Field(
        default="http://localhost:8080",
        description="Address of the training service, without /v1.",
        validate_default=True,
    )
    api_key: SecretStr | None = Field(default=None, description="Sent to the service as a Bearer token.")
    tls: Tls = Tls()
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    page_rows: int = Field(
        default=1000, ge=1, description="Rows asked of datasetio at once: what a submit holds in memory."
    )
    local_folders: list[str] | None = Field(
        default=None,
        description="Folders on the stack's host that datasets may name files of. null: any file that the stack's "
        "user may read, as Llama Stack's own localfs does; []: none.",
    )
    job_routes: Literal["both", "native"] = Field(
        default="both",
        description="Llama Stack 0.5 and 0.6 only. both: job/status?job_uuid= and jobs/{job_uuid}/status answer, and "
        "so do the other job routes, whichever of them the release has; native: the release's own routes.",
    )
    training_config: TrainingDefaults = TrainingDefaults()

    @field_validator("base_url", mode="before")
    @classmethod
    def _text_address(cls, value: object) -> object:
        return _without_equals_sign(value)

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        try:
            url = httpx.URL(value)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url {value!r} is no URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"base_url {value!r} is no address: give http://host:port or https://host:port")
        if url.userinfo or url.query or url.fragment:
            raise ValueError("base_url takes no user, password, query or fragment: a key goes into api_key")
        return value.rstrip("/").removesuffix("/v1")

    @field_validator("api_key", mode="before")
    @classmethod
    def _text_key(cls, value: object) -> object:
        # Llama Stack turns ${env.X} into a number or a boolean where it looks like one; the text is lost then.
        if isinstance(value, bool | int | float):
            raise ValueError("api_key was read as a number or boolean: use a key that has letters in it")
        return _without_equals_sign(value) or None

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not fits_a_header(value.get_secret_value()):
            raise ValueError("api_key has characters that no HTTP header can hold: use printable ASCII, no spaces")
        return value

    @classmethod
    def sample_run_config(cls, **_: Any) -> dict[str, Any]:
        """What Llama Stack's templates put into a run configuration."""
        return {
            "base_url": "${env.TRL_SERVICE_URL:=http://localhost:8080}",
            "api_key": "${env.TRL_SERVICE_API_KEY:=}",
        }


def fits_a_header(key: str) -> bool:
    """Whether a key can be sent as a Bearer token (RFC 6750: visible ASCII)."""
    return all("!" <= character <= "~" for character in key)


def _without_equals_sign(value: object) -> object:
    # Llama Stack 0.2.12 takes all after the colon of ${env.X:=default} for the default.
    return value.removeprefix("=") if isinstance(value, str) else value


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both dictionaries, groups merged key by key; where both have a value, that of ``over``."""
    result = dict(under)
    for key, value in over.items():
        lower = result.get(key)
        result[key] = merged(lower, value) if isinstance(lower, dict) and isinstance(value, dict) else value
    return result
