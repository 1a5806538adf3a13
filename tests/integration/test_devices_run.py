"""Jobs on several devices, as two CPU slots: they compute what one device does, and survive what one process does.

FSDP2 runs on these slots too (``tests/two_ranks.py``); that it does on GPUs no test shows.
"""

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bento_service.jobs.devices import Devices
from bento_service.jobs.job import Job, JobStatus
from bento_service.jobs.supervisor import Supervisor
from bento_service.post_training import TrlPostTrainingImpl
from bento_service.training.__main__ import main
from bento_service.training.run_directory import RunDirectory
from tests.core_factory import MODEL, core, json_lines, request
from tests.tiny_model import make_tiny_model
from tests.trainer_run import DEADLINE, ENVIRONMENT, losses, preference_rows
from tests.two_devices import Case, assert_equal, train_and_compare

# A last batch of one row: one rank has it, the other none.
PAIRS, HELD_OUT, BATCH, EPOCHS = 37, 7, 6, 4
STEPS = -(-PAIRS // BATCH) * EPOCHS


class Host:
    """A service without its HTTP: what submits, and supervisors that come and go."""

    def __init__(self, impl: TrlPostTrainingImpl) -> None:
        self.impl = impl
        self.settings, self.store = impl.settings, impl._store
        self.supervisor = self._start()

    def _start(self) -> Supervisor:
        return Supervisor(self.settings, self.store, devices=Devices("cpu", ("0", "1")))

    def restart(self) -> None:
        """Another supervisor, after the first was killed."""
        self.supervisor = self._start()
        self.supervisor.reconcile()

    def submit(self, **options: Any) -> Job:
        rows = preference_rows(PAIRS + HELD_OUT)
        training, held_out = (
            self.impl.upload(io.BytesIO(json_lines(part)), filename="pairs.jsonl").id
            for part in (rows[:PAIRS], rows[PAIRS:])
        )
        chosen = {
            "tuning": "full",
            "optimizer": {"learning_rate": 1e-3},
            "saving": {"strategy": "steps", "steps": 3},
            "dpo": {"max_row_tokens": 100},
        }
        asked = request(
            training, validation_file=held_out, batch_size=BATCH, n_epochs=EPOCHS, seed=7, options=chosen | options
        )
        return self.impl.submit(asked)

    def drive(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, "it took too long"
            self.supervisor.step()
            time.sleep(0.1)

    def drive_to_step(self, job: Job, step: int) -> None:
        def there() -> bool:
            found = self.store.get_job(job.id)
            assert not found.status.is_terminal, self.directory(job).log_tail()
            return found.status is JobStatus.RUNNING and found.progress.step >= step

        self.drive(there)

    def drive_to(self, job: Job, status: JobStatus) -> Job:
        self.drive(lambda: self.store.get_job(job.id).status in (status, JobStatus.FAILED))
        found = self.store.get_job(job.id)
        assert found.status is status, (found.error, self.directory(job).log_tail())
        return found

    def directory(self, job: Job) -> RunDirectory:
        return RunDirectory(self.settings.runs_path / job.id)

    def ranks(self, job: Job) -> list[psutil.Process]:
        """The processes that train the job, by rank."""
        if job.id not in self.supervisor.runs:
            return []
        agent = psutil.Process(self.supervisor.runs[job.id].trainer.pid)
        ranks = [process for process in agent.children() if "RANK" in process.environ()]  # not between fork and exec
        return sorted(ranks, key=lambda process: process.environ()["RANK"])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    home = tmp_path_factory.mktemp("home")
    with core(home, cpu_slots=2, warm_trainers=0, retry_backoff_seconds=0.01, grace_seconds=60) as impl:
        host = Host(impl)
        make_tiny_model(host.settings.models_path / MODEL)
        yield host
        for run in host.supervisor.runs.values():
            run.trainer.kill()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("signals")
def test_a_job_survives_the_death_of_any_of_its_processes_and_equals_one_device(host: Host, tmp_path: Path) -> None:
    job = host.submit(devices=2)
    assert job.spec.distribution == "ddp"

    host.drive(lambda: len(host.ranks(job)) == 2)
    ranks = host.ranks(job)
    os.kill(host.supervisor.runs[job.id].trainer.pid, signal.SIGKILL)
    assert psutil.wait_procs(ranks, timeout=10)[1] == [], "ranks outlived the agent"
    host.drive(lambda: host.store.get_job(job.id).attempt == 2)

    host.drive_to_step(job, 4)
    first, second = host.ranks(job)
    agent = psutil.Process(host.supervisor.runs[job.id].trainer.pid)
    listening = {
        connection.laddr.ip
        for process in (agent, first, second)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}
    second.kill()
    host.drive(lambda: host.store.get_job(job.id).attempt == 3)
    assert not first.is_running()

    host.drive_to_step(job, 8)
    ranks = host.ranks(job)
    host.restart()  # adopts the agent
    host.impl.pause(job.id)
    host.drive_to(job, JobStatus.PAUSED)
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    run = host.directory(job)
    stopped_after = max(losses(run))
    assert run.complete_checkpoints()[-1].name == f"checkpoint-{stopped_after}"
    assert {file.name for file in run.complete_checkpoints()[-1].glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }

    host.impl.resume(job.id)
    host.drive_to(job, JobStatus.SUCCEEDED)
    told = [event.message for event in host.store.list_events(job.id, limit=5000).data]
    assert any("rank 1 of 2 was killed by SIGKILL" in message for message in told)

    alone = RunDirectory(tmp_path / "alone")
    alone.write_spec(job.spec.model_copy(update={"distribution": None}))
    assert main([str(alone.path), "--attempt", "1"]) == 0
    assert losses(run).keys() == set(range(1, STEPS + 1))
    assert_equal(run, alone)
    log = run.log_file.read_text()
    assert "[rank 0] " in log and "[rank 1] " in log
    assert not run.rank_outcomes.exists()


@pytest.mark.usefixtures("signals")
def test_methods_on_two_devices_equal_one(tmp_path: Path) -> None:
    cases = [
        Case("dpo", "fsdp", {"tuning": "full", "dpo": {"max_row_tokens": 100}}),
        Case("dpo", "fsdp", {"gradient_accumulation_steps": 2, "dpo": {"packing": False}}),
        Case("supervised", "fsdp", {"tuning": "full"}),
        Case("supervised", "ddp", {"max_length": 64, "sft": {"packing": True}}),
        Case("kto", "ddp"),
        Case("reward", "ddp"),
    ]
    train_and_compare(cases, tmp_path, continued=2)
