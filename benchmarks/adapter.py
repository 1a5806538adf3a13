"""What Llama Stack and the adapter add: ``python benchmarks/adapter.py [--rows 5000] [--calls 200]``.

A real Llama Stack (the installed release) stands in front of a stand-in for the training service that trains nothing:
what is measured is the way through the stack. Prints the time of a status call at the service and through the stack,
of a submit of the rows, and of a second submit, which sends none of them again; and the peak resident memory of the
stack's process before and after.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.fake_training_service import FakeTrainingService  # noqa: E402
from tests.stack_server import stack_server  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    text = "word " * 100  # a row of about 1.5 kB
    rows = [{"prompt": f"{i} {text}", "chosen": f"good {i} {text}", "rejected": text} for i in range(arguments.rows)]
    service = FakeTrainingService()
    with (
        tempfile.TemporaryDirectory() as home,
        service.serve() as url,
        stack_server(Path(home), url) as stack,
        httpx.Client(base_url=stack.url, timeout=600, trust_env=False) as through,
        httpx.Client(base_url=url, timeout=600, trust_env=False) as direct,
    ):
        source = {"type": "rows", "rows": rows}
        body = {"dataset_id": "rows", "purpose": "post-training/messages", "source": source}
        registered = timed(lambda: through.post("/v1beta/datasets", json=body))
        before = peak_resident(stack.process.pid)
        first = timed(lambda: submit(through, "first"))
        second = timed(lambda: submit(through, "second"))
        after = peak_resident(stack.process.pid)
        job = next(iter(service.jobs))
        at_service = median(lambda: direct.get(f"/v1/fine_tuning/jobs/{job}"), arguments.calls)
        at_stack = median(lambda: through.get("/v1alpha/post-training/jobs/first/status"), arguments.calls)
    megabytes = len(service.files[service.jobs[job]["training_file"]]) / 1e6
    print(f"dataset                        {arguments.rows} rows, {megabytes:.1f} MB")
    print(f"registered at the stack        {registered:.2f} s")
    print(f"submit                         {first:.2f} s")
    print(f"second submit, nothing resent  {second:.2f} s")
    print(f"status at the service          {at_service * 1e3:.1f} ms (median of {arguments.calls})")
    print(f"status through the stack       {at_stack * 1e3:.1f} ms (two calls of the service)")
    print(f"stack's peak resident memory   {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")


def submit(http: httpx.Client, job_uuid: str) -> httpx.Response:
    data = {"dataset_id": "rows", "batch_size": 8, "shuffle": True, "data_format": "dialog"}
    body = {
        "job_uuid": job_uuid,
        "finetuned_model": "org/model",
        "algorithm_config": {"beta": 0.1},
        "training_config": {"n_epochs": 1, "data_config": data},
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    return http.post("/v1alpha/post-training/preference-optimize", json=body)


def timed(call: Callable[[], httpx.Response]) -> float:
    start = time.perf_counter()
    call().raise_for_status()
    return time.perf_counter() - start


def median(call: Callable[[], httpx.Response], calls: int) -> float:
    return statistics.median(timed(call) for _ in range(calls))


def peak_resident(pid: int) -> int:
    """Bytes, since the process began."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
