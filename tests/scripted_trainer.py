"""Stands in for the trainer in tests of the engine: same files, same signals, no training.

Does what ``script.json`` in the run directory says:

    steps               how many metrics events
    step_seconds        how long a step takes
    ends                succeeded, failed, retryable, or hang until SIGTERM
    crashes             attempts that die by SIGKILL before they end
    ignore_sigterm      true or false
    megabytes_of_noise  written to standard output before the first step
    hold                where the first attempt waits for the file ``release``: start, a step's number, or outcome
                        (after that is written); the file ``held`` says that it is there

It resumes from the last step that its own events file holds. Two of them on one run directory leave the file
``second-trainer``.
"""

import argparse
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from bento_service.training.events import EventWriter, read_events
from bento_service.training.lease import LeaseWatch
from bento_service.training.run_directory import Outcome, RunDirectory
from bento_service.training.spare import await_orders

parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path, nargs="?")
parser.add_argument("--attempt", type=int)
parser.add_argument("--await-go", action="store_true")
parser.add_argument("--spare", action="store_true")
arguments = parser.parse_args()
if arguments.spare:
    orders = await_orders(lambda: None)
    arguments.run, arguments.attempt = orders.run_directory, orders.attempt
if arguments.await_go and sys.stdin.readline() != "go\n":
    sys.exit(0)

run = RunDirectory(arguments.run)
alone = (run.path / "alone.lock").open("w")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (run.path / "second-trainer").touch()
run.read_spec()
LeaseWatch(run.lease_file, period=0.05).start()
script = {
    "hold": None,
    "megabytes_of_noise": 0,
    "steps": 3,
    "step_seconds": 0.0,
    "ends": "succeeded",
    "crashes": 0,
    "ignore_sigterm": False,
}
if (run.path / "script.json").exists():
    script |= json.loads((run.path / "script.json").read_text())
stop = False


def on_sigterm(number: int, frame: object) -> None:
    global stop
    stop = not script["ignore_sigterm"]


signal.signal(signal.SIGTERM, on_sigterm)


def hold(where: object) -> None:
    if script["hold"] != where or (run.path / "held").exists():
        return
    (run.path / "held").touch()
    while not (run.path / "release").exists() and not stop:
        time.sleep(0.01)


hold("start")
done = [e.data["step"] for e in read_events(run.events_file)[0] if e.type == "metrics"]
step = max(done, default=0)
events = EventWriter(run.events_file)
print(f"attempt {arguments.attempt} from step {step}")
print(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
print(f"environment: {sorted(os.environ)}")
for _ in range(script["megabytes_of_noise"]):
    print("noise! " * (2**20 // 7))
events.write("progress", "Training starts", step=step, total_steps=script["steps"], epoch=0.0, tokens=0)
while step < script["steps"] and not stop:
    step += 1
    events.write("metrics", f"Step {step}", step=step, total_steps=script["steps"], epoch=0.0, tokens=8, loss=1 / step)
    hold(step)
    deadline = time.monotonic() + script["step_seconds"]
    while time.monotonic() < deadline and not stop:
        time.sleep(0.01)
if arguments.attempt <= script["crashes"]:
    print("about to crash")
    os.kill(os.getpid(), signal.SIGKILL)
while script["ends"] == "hang" and not stop:
    time.sleep(0.01)
status = "succeeded" if script["ends"] == "hang" else "failed" if script["ends"] == "retryable" else script["ends"]
if stop:
    status = "stopped"
failure = {"code": "scripted", "message": "as told"} if status == "failed" else {}
run.write_outcome(
    Outcome(attempt=arguments.attempt, status=status, retryable=script["ends"] == "retryable", **failure)
)
hold("outcome")
sys.exit(status == "failed")
