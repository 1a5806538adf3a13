"""The same jobs on one device and on two, which are CPU processes: what each reports must be the same."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bento_service.training.__main__ import main
from bento_service.training.run_directory import RunDirectory
from bento_service.training.spec import Distribution, MethodName
from tests.tiny_model import make_tiny_model
from tests.trainer_run import (
    DEADLINE,
    ENVIRONMENT,
    REPOSITORY,
    chat_rows,
    events_of,
    make_run,
    preference_rows,
    write_rows,
)

# What depends on how a batch is cut, or on the clock.
NOT_COMPARED = {"padding_fraction", "memory_peak_bytes", "tokens_per_second", "rows_per_second"}


@dataclass(frozen=True)
class Case:
    method: MethodName
    distribution: Distribution
    options: dict[str, Any] = field(default_factory=dict)


def assert_equal(run: RunDirectory, expected: RunDirectory) -> None:
    """Every metric and evaluation of two runs, of a step that two attempts made the later one's."""
    for kind in ("metrics", "evaluation"):
        ours, theirs = (
            {event.data["step"]: event.data for event in events_of(each, kind)} for each in (run, expected)
        )
        assert ours.keys() == theirs.keys() != set()
        for step, values in theirs.items():
            for name, value in values.items():
                if name not in NOT_COMPARED and "per_second" not in name and "runtime" not in name:
                    assert ours[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (run.path.name, step, name)


def train_and_compare(
    cases: Sequence[Case], folder: Path, *, continued: int, environment: Mapping[str, str] | None = None
) -> None:
    """Train every case on one device and on two, each with a last batch of one row; the two must report the same.

    The first ``continued`` of those on two devices do so again after they have continued from a checkpoint.
    ``environment`` is the ranks'. A trainer in this process takes over its signals.
    """
    model = make_tiny_model(folder / "model")
    alone, shared = [], []
    for number, case in enumerate(cases):
        rows = _rows(case.method, 17)
        training, held_out = (
            write_rows(folder / f"{number}-{part}.jsonl", rows[chosen])
            for part, chosen in (("train", slice(13)), ("held_out", slice(13, None)))
        )
        for runs, devices in ((alone, 1), (shared, 2)):
            run = make_run(
                folder / f"{number}-{case.method}-{devices}",
                model,
                training,
                validation_file=held_out,
                method=case.method,
                beta=0.1 if case.method in ("dpo", "kto") else None,
                batch_size=4,
                devices=devices,
                saving={"strategy": "steps", "steps": 1},
                **case.options,
            )
            runs.append(run)
            if devices == 1:
                assert main([str(run.path), "--attempt", "1"]) == 0
            else:
                run.write_spec(run.read_spec().model_copy(update={"distribution": case.distribution}))
    again = shared[:continued]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("tests/two_ranks.py", *(str(run.path) for run in [*shared, *again])),
        ],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", **(environment or {})},
        timeout=DEADLINE * len(cases),
        check=True,
    )
    for ours, expected in zip(shared, alone, strict=True):
        assert_equal(ours, expected)
    for run in again:
        assert any("continuing from" in event.message for event in events_of(run, "message"))


def _rows(method: MethodName, count: int) -> list[dict[str, Any]]:
    if method == "supervised":
        return chat_rows(count)
    pairs = preference_rows(count)
    if method != "kto":
        return pairs
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, pair in enumerate(pairs)
    ]
