"""The main job on one machine: a real Llama Stack, a real training service, DPO on real preference pairs.

Run by ``make demo``. Starts the service and the stack, registers ``preferences.jsonl`` on the stack, submits
preference-optimize there, watches it there, and compares reward accuracy and margin on held-out pairs before and
after. Stops everything it started. Exit status 0 only if the job completed and the margin rose.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
REPOSITORY = EXAMPLES.parent
STATE = REPOSITORY / ".demo"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
START_SECONDS = 120
JOB_SECONDS = 1200

console = Console(soft_wrap=True)


class DemoFailed(Exception):
    """The message says what happened and what to do."""


def main() -> int:
    # Jobs of an earlier, interrupted demo would be carried on first.
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir()
    with ExitStack() as running:
        try:
            service = running.enter_context(training_service())
            stack = running.enter_context(llama_stack(service))
            before, after, checkpoint = train(stack)
        except DemoFailed as failure:
            console.print(f"[bold red]The demo failed.[/] {failure}", highlight=False)
            return 1
        except httpx.TransportError as error:
            console.print(f"[bold red]The demo failed.[/] A server went away ({error}). The logs' last lines:")
            for log in sorted(STATE.glob("*.log")):
                console.print(f"{shown(log)}:\n{tail(log)}", highlight=False)
            return 1
        except KeyboardInterrupt:
            console.print("Interrupted; stopping what was started.")
            return 130
        show(before, after, checkpoint)
    if not after["margin"] > before["margin"]:
        console.print("[bold red]The reward margin on the held-out pairs did not rise.[/]")
        return 1
    suggest(checkpoint)
    return 0


@contextmanager
def training_service() -> Iterator[str]:
    port = choose_port(8080, "The training service")
    environment = {
        "TRL_HOME": str(STATE / "home"),
        "TRL_MODELS_DIR": os.environ.get("TRL_MODELS_DIR", str(REPOSITORY / ".models")),
        "BENTOML_HOME": str(STATE / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "bento_service.service:TrlTrainingService"]
    url = f"http://127.0.0.1:{port}"
    with server(
        "Training service", [*command, "--host", "127.0.0.1", "--port", str(port)], environment, "service.log"
    ):
        wait_until_up("The training service", f"{url}/readyz", STATE / "service.log")
        console.print(f"Training service on {url}  (log: {shown(STATE / 'service.log')})", highlight=False)
        yield url


@contextmanager
def llama_stack(service: str) -> Iterator[str]:
    port = choose_port(8321, "Llama Stack")
    environment = {
        "TRL_SERVICE_URL": service,
        "SQLITE_STORE_DIR": str(STATE / "stack"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(Path(sys.executable).with_name("llama")), "stack", "run", "run_remote.yaml", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with server("Llama Stack", command, environment, "stack.log"):
        wait_until_up("Llama Stack", f"{url}/v1/health", STATE / "stack.log")
        console.print(f"Llama Stack on {url}  (log: {shown(STATE / 'stack.log')})", highlight=False)
        yield url


def train(stack: str) -> tuple[dict[str, float], dict[str, float], str]:
    """Register, submit, watch. Returns held-out accuracy and margin before and after, and the checkpoint's folder."""
    job = f"demo-{uuid.uuid4().hex[:8]}"
    with httpx.Client(base_url=stack, timeout=120, trust_env=False) as client:
        for name in ("preferences", "preferences_heldout"):
            rows = [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text().splitlines()]
            source = {"type": "rows", "rows": rows}
            body = {"dataset_id": f"{name}-{job}", "purpose": "post-training/messages", "source": source}
            checked(client.post("/v1beta/datasets", json=body))
            console.print(f"Registered {len(rows)} pairs as dataset {name}-{job}", highlight=False)
        submit = {
            "job_uuid": job,
            "finetuned_model": MODEL,
            "algorithm_config": {"beta": 0.1, "loss_type": "sigmoid"},
            "training_config": {
                "n_epochs": 1,
                "data_config": {
                    "dataset_id": f"preferences-{job}",
                    "validation_dataset_id": f"preferences_heldout-{job}",
                    "batch_size": 4,
                    "shuffle": True,
                    "data_format": "dialog",
                },
                "optimizer_config": {
                    "optimizer_type": "adamw",
                    "lr": 2e-4,
                    "weight_decay": 0.01,
                    "num_warmup_steps": 1,
                },
            },
            "hyperparam_search_config": {"max_length": 256, "evaluation": {"strategy": "end"}},
            "logger_config": {},
        }
        checked(client.post("/v1alpha/post-training/preference-optimize", json=submit))
        console.print(f"Submitted job {job}: DPO on {MODEL} through {stack}", highlight=False)
        status = watch(client, job)
        details = status["resources_allocated"]
        if status["status"] != "completed":
            error = details.get("error") or {}
            raise DemoFailed(f"Job {job} is {status['status']}: {error.get('message', 'no reason given')}")
        artifacts = checked(client.get(f"/v1alpha/post-training/jobs/{job}/artifacts")).json()
        checkpoint = max(artifacts["checkpoints"], key=lambda c: c["created_at"])["path"]
        return held_out(details["baseline"]), held_out(details["evaluation"]), checkpoint


def watch(client: httpx.Client, job: str) -> dict[str, Any]:
    """Show a job's progress until it has ended; returns its last status."""
    columns = (
        TextColumn("step {task.completed:g}/{task.total:g}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  margin {task.fields[margin]}  accuracy {task.fields[accuracy]}"),
        TextColumn("ETA {task.fields[eta]}"),
    )
    deadline = time.monotonic() + JOB_SECONDS
    printed = 0
    if not console.is_terminal:
        console.print("The trainer starts: libraries, model, evaluation before training")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("DPO", total=1, loss="-", margin="-", accuracy="-", eta="starting")
        while time.monotonic() < deadline:
            status: dict[str, Any] = checked(client.get(f"/v1alpha/post-training/jobs/{job}/status")).json()
            details = status["resources_allocated"]
            progress, metrics = details["progress"], details["metrics"]
            step, total = progress["step"], progress["total_steps"] or 1
            fields = {
                "loss": number(metrics.get("loss")),
                "margin": number(metrics.get("rewards/margins")),
                "accuracy": number(metrics.get("rewards/accuracies")),
                "eta": remaining(details.get("estimated_finish")),
            }
            bar.update(task, completed=step, total=total, **fields)  # type: ignore[arg-type]
            if not console.is_terminal and step != printed and (step % 4 == 0 or step == total):
                printed = step
                values = "  ".join(f"{name} {value}" for name, value in fields.items())
                console.print(f"step {step}/{total}  {values}", highlight=False)
            if status["status"] in ("completed", "failed", "cancelled"):
                return status
            time.sleep(0.5)
    raise DemoFailed(f"Job {job} did not end within {JOB_SECONDS} s; see {shown(STATE / 'service.log')}")


def show(before: dict[str, float], after: dict[str, float], checkpoint: str) -> None:
    table = Table(title="Held-out pairs (none of them was trained on)")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("reward accuracy", f"{before['accuracy']:.2f}", f"{after['accuracy']:.2f}")
    table.add_row("reward margin", f"{before['margin']:.3f}", f"{after['margin']:.3f}")
    console.print(table)
    console.print(
        "Rewards are measured against the base model, so before training both are 0 by definition.", highlight=False
    )
    console.print(f"Checkpoint: {checkpoint}", highlight=False)


def suggest(checkpoint: str) -> None:
    console.print(
        "\nWhat to try next:\n"
        f"  look at the adapter     ls {checkpoint}\n"
        "  your own pairs          put them into examples/preferences.jsonl, then make demo\n"
        "  the servers by hand     make serve   (8080)   and   make stack   (8321), then follow README.md\n"
        "  the service's API       make serve, then open http://127.0.0.1:8080/docs",
        highlight=False,
    )


def held_out(evaluation: dict[str, float]) -> dict[str, float]:
    return {
        "accuracy": evaluation["eval_rewards/accuracies"],
        "margin": evaluation["eval_rewards/margins"],
    }


def checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise DemoFailed(
        f"{response.request.method} {response.request.url} answered {response.status_code}: {response.text}"
    )


@contextmanager
def server(name: str, command: list[str], environment: dict[str, str], log_name: str) -> Iterator[None]:
    """A server process, stopped gracefully with the context and by force after that."""
    # What this shell has set for servers of its own must not reach these.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRL_", "BENTOML_", "SQLITE_STORE_"))}
    with (STATE / log_name).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**inherited, **environment, "NO_PROXY": "127.0.0.1,localhost"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    RUNNING[log_name] = process
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            console.print(f"{name} did not stop within 60 s and is killed.")
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


RUNNING: dict[str, "subprocess.Popen[bytes]"] = {}


def wait_until_up(name: str, url: str, log: Path) -> None:
    process = RUNNING[log.name]
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise DemoFailed(f"{name} ended at its start; the last lines of {shown(log)}:\n{tail(log)}")
            try:
                if client.get(url).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise DemoFailed(f"{name} did not answer at {url} within {START_SECONDS} s; see {shown(log)}")


def choose_port(wanted: int, name: str) -> int:
    """The usual port, or a free one when something else has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
            return wanted
        except OSError:
            pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    console.print(f"{name}: port {wanted} is taken, using {port}.", highlight=False)
    return port


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def remaining(finish: int | None) -> str:
    if finish is None:
        return "-"
    seconds = max(0, finish - round(time.time()))
    return f"{seconds // 60}:{seconds % 60:02d}"


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def shown(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    # A stop from outside ends the servers too.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    sys.exit(main())
