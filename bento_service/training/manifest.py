"""What a run was: versions, settings, data, hardware and metrics, so that it can be told and repeated.

It holds no path and no name of the host: it travels with the model. Reading one imports nothing heavy.
"""

import json
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, Field

import bento_service
from bento_service.errors import UnreadableRun
from bento_service.plain_file import open_plain
from bento_service.training.best import Best
from bento_service.training.checkpoints import MANIFEST_FILE, sha256_of
from bento_service.training.events import read_events
from bento_service.training.run_directory import RunDirectory, write_durably
from bento_service.training.spec import TrainingSpec

# Everything between the rows and the numbers.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")

# Of an event's data, what says where the run was and not how well it did.
_POSITION = {"step", "total_steps", "epoch", "tokens"}

_PATHS = {"model_path", "training_file", "validation_file"}


class DatasetDigest(BaseModel):
    role: Literal["training", "validation"]
    bytes: int
    sha256: str


class Build(BaseModel):
    """Which build of this service; each is null where it is not known."""

    git_commit: str | None = Field(description="Of the checkout that the service runs from.")
    bento: str | None = Field(description="Tag of the Bento that the service runs from, as name:version.")


class Hardware(BaseModel):
    machine: str = Field(description="Processor architecture.")
    system: str
    cpu_cores: int
    memory_bytes: int
    gpus: list[str] = Field(description="Names of the GPUs that the trainer saw.")
    cuda: str | None = Field(description="Version of CUDA that PyTorch was built for.")


class Evaluation(BaseModel):
    step: int = Field(description="0: before the first step.")
    metrics: dict[str, float | None]


class RunMetrics(BaseModel):
    step: int = Field(description="Optimizer steps done.")
    tokens: int = Field(description="Tokens trained, padding not counted.")
    training: dict[str, float | None] = Field(description="The last values, under TRL's names.")
    evaluations: list[Evaluation] = Field(description="In the order of their steps.")
    best: Best | None = Field(default=None, description="The best checkpoint's evaluation.")


class PublishedFile(BaseModel):
    name: str
    bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    step: int
    epoch: float
    tokens: int
    final: bool
    files: list[PublishedFile]


class RunManifest(BaseModel):
    """``manifest.json`` of a run, and of each of its checkpoints."""

    format: Literal[1] = 1
    job_id: str
    created_at: int = Field(description="Unix seconds.")
    method: str
    base_model: str
    seed: int
    settings: dict[str, Any] = Field(description="The full resolved specification, without the host's paths.")
    datasets: list[DatasetDigest]
    versions: dict[str, str] = Field(description="Of Python, this service (trl-remote) and the libraries it uses.")
    build: Build
    hardware: Hardware
    metrics: RunMetrics
    checkpoint: CheckpointManifest | None = Field(default=None, description="The checkpoint, with all its files.")


def describe(run: RunDirectory) -> RunManifest:
    """The run as it is now, from its specification, its events and this process. Imports torch."""
    spec = run.read_spec()
    return RunManifest(
        job_id=spec.job_id,
        created_at=int(time.time()),
        method=spec.method,
        base_model=spec.model,
        seed=spec.seed,
        settings=spec.model_dump(mode="json", exclude=_PATHS),
        datasets=_datasets(spec),
        versions={
            "python": platform.python_version(),
            "trl-remote": bento_service.__version__,
            **{package: version(package) for package in (*PACKAGES, *_further_packages(spec))},
        },
        build=_build(Path(bento_service.__file__).resolve().parent.parent),
        hardware=_hardware(),
        metrics=read_metrics(run),
    )


def conclude(run: RunDirectory) -> None:
    """Write the manifest of a run that has succeeded: as it is now, with its last checkpoint."""
    manifest = describe(run)
    if complete := run.complete_checkpoints():
        contents = complete[-1] / MANIFEST_FILE
        if contents.exists():  # checkpoints of older versions have none
            saved = json.loads(contents.read_bytes())["checkpoint"]
            manifest.checkpoint = CheckpointManifest.model_validate(saved)
    write_durably(run.manifest_file, manifest.model_dump_json(indent=2))


def read(run: RunDirectory) -> RunManifest | None:
    """The manifest of a run; None when it has none (yet). Raises UnreadableRun."""
    try:
        with open_plain(run.manifest_file) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    try:
        return RunManifest.model_validate_json(content)
    except ValueError as error:
        raise UnreadableRun(f"{run.manifest_file} cannot be read: {error}") from error


def read_metrics(run: RunDirectory) -> RunMetrics:
    """The metrics that the run's events tell; of a step made twice, the later ones."""
    metrics = RunMetrics(step=0, tokens=0, training={}, evaluations=[])
    evaluations: dict[int, dict[str, float | None]] = {}
    offset = 0
    while True:
        events, end = read_events(run.events_file, offset)
        if end == offset:
            break
        offset = end
        for event in events:
            values = {name: value for name, value in event.data.items() if name not in _POSITION}
            if event.type == "metrics":
                metrics.step, metrics.tokens = event.data["step"], event.data["tokens"]
                metrics.training = values
            elif event.type == "evaluation":
                evaluations[event.data["step"]] = values
            elif best := event.data.get("best"):
                metrics.best = Best.model_validate(best)
    metrics.evaluations = [Evaluation(step=step, metrics=values) for step, values in sorted(evaluations.items())]
    return metrics


def _further_packages(spec: TrainingSpec) -> list[str]:
    return [] if spec.options.lora.quantization is None else ["bitsandbytes"]


def _datasets(spec: TrainingSpec) -> list[DatasetDigest]:
    digests = [_digest("training", Path(spec.training_file))]
    if spec.validation_file is not None:
        digests.append(_digest("validation", Path(spec.validation_file)))
    return digests


@cache  # once a process, however many checkpoints it saves
def _digest(role: Literal["training", "validation"], file: Path) -> DatasetDigest:
    return DatasetDigest(role=role, bytes=file.stat().st_size, sha256=sha256_of(file))


@cache
def _build(root: Path) -> Build:
    """``root`` is the folder that holds this package: a git checkout, a Bento's src/, or site-packages."""
    return Build(git_commit=_git_commit(root), bento=_bento_tag(root.parent / "bento.yaml"))


def _git_commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the git commit of {root} is not known: {error}", file=sys.stderr)
        return None
    return answer.stdout.strip()


def _bento_tag(description: Path) -> str | None:
    if not description.is_file():
        return None
    import yaml  # type: ignore[import-untyped]

    values = yaml.safe_load(description.read_bytes())
    return f"{values['name']}:{values['version']}"


def _hardware() -> Hardware:
    import torch

    return Hardware(
        machine=platform.machine(),
        system=platform.system(),
        cpu_cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        cuda=torch.version.cuda,
    )
