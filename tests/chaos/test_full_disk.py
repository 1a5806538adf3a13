"""A disk that fills during a run: the job is paused with the reason, its last checkpoint is whole, and it goes on."""

import subprocess
import time

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bento_service.jobs.devices import Devices
from bento_service.jobs.job import JobStatus
from bento_service.jobs.store import Store
from bento_service.jobs.supervisor import Supervisor
from bento_service.settings import Settings
from bento_service.training.__main__ import failure
from bento_service.training.run_directory import RunDirectory
from tests.job_factory import make_file, make_job
from tests.tiny_model import make_tiny_model
from tests.trainer_run import preference_rows, write_rows

# The engine asks for 64 MiB beside the checkpoints before it starts a job.
DISK_MEGABYTES = 90
STEPS = 60


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def torch_file(path):
    torch.save({"exp_avg": torch.ones(100_000)}, path)


def safetensors_file(path):
    save_file({"weight": torch.ones(100_000)}, path)


def tokenizer_file(path):
    Tokenizer(WordLevel({f"word {number}": number for number in range(20_000)}, unk_token="word 0")).save(str(path))


def arrow_file(path):
    Dataset.from_dict({"row": [1, 2]}).map(lambda _: {"text": "x" * 400_000}, cache_file_name=str(path))


@pytest.mark.parametrize("write", [torch_file, safetensors_file, tokenizer_file, arrow_file])
@pytest.mark.parametrize("free", [0, 100_000], ids=["full from the start", "full in the middle"])
def test_every_library_that_writes_is_understood(small_disk, write, free):
    filler = fill(small_disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - free)
    with pytest.raises(Exception) as caught:
        write(small_disk / "written.arrow")
    assert failure(caught.value, attempt=1).code == "disk_full", repr(caught.value)


def test_a_full_disk_pauses_the_job_and_keeps_its_last_checkpoint(small_disk, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(8))
    settings = Settings(home=small_disk, device="cpu", grace_seconds=30)
    store = Store.open(f"sqlite:///{tmp_path / 'trl.db'}")
    saving = {"strategy": "steps", "steps": 1, "total_limit": 2}
    job = make_job(store.add_file(make_file()).id, options={"tuning": "full", "max_steps": STEPS, "saving": saving})
    spec = job.spec.model_copy(
        update={"model_path": str(model), "training_file": str(data), "batch_size": 2, "n_epochs": STEPS}
    )
    object.__setattr__(job, "spec", spec)
    store.create_job(job)
    supervisor = Supervisor(settings, store, devices=Devices("cpu", ("0",)))
    run = RunDirectory(settings.runs_path / job.id)

    def drive(condition, seconds=180):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (store.get_job(job.id), "\n".join(run.log_tail()))
            supervisor.step()
            time.sleep(0.02)

    drive(lambda: store.list_checkpoints(job.id).data)
    filler = fill(small_disk)
    drive(lambda: store.get_job(job.id).status is not JobStatus.RUNNING)
    filler_size = filler.stat().st_size
    filler.unlink()
    last = store.list_events(job.id).data[0]
    assert store.get_job(job.id).status is JobStatus.PAUSED, (last.message, "\n".join(run.log_tail()))
    assert "disk is full" in last.message and filler_size > 0
    kept = run.complete_checkpoints()
    assert kept
    with safe_open(kept[-1] / "model.safetensors", framework="np") as weights:
        assert weights.keys()
    step = int(kept[-1].name.removeprefix("checkpoint-"))

    store.resume(job.id)
    drive(lambda: store.get_job(job.id).status.is_terminal)
    assert store.get_job(job.id).status is JobStatus.SUCCEEDED
    events = store.list_events(job.id, order="asc", limit=1000).data
    assert any(f"continuing from checkpoint-{step}" in event.message for event in events)
    store.close()
