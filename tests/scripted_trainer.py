"""Stands in for the trainer in tests of the engine: same files, same signals, no training.

Does what ``script.json`` in the run directory says: ``steps`` (how many metrics events), ``step_seconds``,
``ends`` (succeeded, failed, retryable, crash, hang), ``crashes`` (attempts that die by SIGKILL before
they end), ``ignore_sigterm``. It resumes from the last step that its own events file holds.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from bento_service.training.events import EventWriter, read_events
from bento_service.training.lease import LeaseWatch
from bento_service.training.run_directory import Outcome, RunDirectory

parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("--attempt", type=int, required=True)
parser.add_argument("--await-go", action="store_true")
arguments = parser.parse_args()
if arguments.await_go and sys.stdin.readline() != "go\n":
    sys.exit(0)

run = RunDirectory(arguments.run)
run.read_spec()
LeaseWatch(run.lease_file, period=0.05).start()
script = {"steps": 3, "step_seconds": 0.0, "ends": "succeeded", "crashes": 0, "ignore_sigterm": False}
if (run.path / "script.json").exists():
    script |= json.loads((run.path / "script.json").read_text())
stop = False


def on_sigterm(number: int, frame: object) -> None:
    global stop
    stop = not script["ignore_sigterm"]


signal.signal(signal.SIGTERM, on_sigterm)
done = [e.data["step"] for e in read_events(run.events_file)[0] if e.type == "metrics"]
step = max(done, default=0)
events = EventWriter(run.events_file)
print(f"attempt {arguments.attempt} from step {step}")
events.write("progress", "Training starts", step=step, total_steps=script["steps"], epoch=0.0, tokens=0)
while step < script["steps"] and not stop:
    step += 1
    events.write("metrics", f"Step {step}", step=step, total_steps=script["steps"], epoch=0.0, tokens=8, loss=1 / step)
    deadline = time.monotonic() + script["step_seconds"]
    while time.monotonic() < deadline and not stop:
        time.sleep(0.01)
if arguments.attempt <= script["crashes"]:
    print("about to crash")
    os.kill(os.getpid(), signal.SIGKILL)
while script["ends"] == "hang" and not stop:
    time.sleep(0.01)
if stop:
    run.write_outcome(Outcome(attempt=arguments.attempt, status="stopped"))
elif script["ends"] == "succeeded":
    run.write_outcome(Outcome(attempt=arguments.attempt, status="succeeded"))
elif script["ends"] in ("failed", "retryable"):
    retryable = script["ends"] == "retryable"
    run.write_outcome(
        Outcome(attempt=arguments.attempt, status="failed", code="scripted", message="as told", retryable=retryable)
    )
    sys.exit(1)
