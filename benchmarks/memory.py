"""How well memory is estimated: ``python benchmarks/memory.py --model FOLDER [--case lora,4,256,fp32 ...]``.

Trains two steps of each case in a process of its own, on the CPU, and prints the estimate of ``training/memory.py``
beside the peak of that process's resident memory. A case is tuning, batch size, tokens of the longest sequence,
precision, and optionally ``checkpointing``, ``accumulate``, and ``nf4`` or ``int8``. A model folder is made by
``python -m bento_service.training.embedded_model DIR``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bento_service.training.memory import estimate, padded_batch  # noqa: E402
from bento_service.training.model_shape import ModelShape  # noqa: E402
from bento_service.training.run_directory import RunDirectory  # noqa: E402
from bento_service.training.spec import TrainingSpec, TrlOptions  # noqa: E402

CASES = (
    "lora,2,128,fp32",
    "lora,4,256,fp32",
    "lora,8,256,fp32",
    "lora,4,512,fp32",
    "lora,4,512,fp32,checkpointing",
    "lora,4,256,bf16",
    "lora,2,128,fp32,nf4",
    "lora,2,128,bf16,nf4",
    "full,2,128,fp32",
    "full,4,256,fp32",
    "full,8,256,fp32",
    "full,4,256,fp32,accumulate",
    "full,4,256,bf16",
)
STEPS = 2  # the optimizer's moments are there from the second step on


@dataclass(frozen=True)
class Case:
    tuning: str
    batch_size: int
    length: int
    precision: str
    more: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Case":
        tuning, batch_size, length, precision, *more = text.split(",")
        return cls(tuning, int(batch_size), int(length), precision, tuple(more))


def measure(case: Case, model: Path, folder: Path) -> tuple[int, int]:
    """Estimated and measured bytes."""
    accumulation = 2 if "accumulate" in case.more else 1
    data = folder / "pairs.jsonl"
    pairs = case.batch_size * accumulation * STEPS
    data.write_text("".join(json.dumps(pair(number, case.length)) + "\n" for number in range(pairs)))
    spec = TrainingSpec(
        job_id="ftjob-memory",
        method="dpo",
        model=model.name,
        model_path=str(model),
        training_file=str(data),
        validation_file=None,
        seed=0,
        beta=0.1,
        batch_size=case.batch_size,
        n_epochs=1,
        learning_rate=1e-6,
        device="cpu",
        options=TrlOptions.model_validate(
            {
                "tuning": case.tuning,
                "lora": {"quantization": next((name for name in ("nf4", "int8") if name in case.more), None)},
                "dpo": {"packing": False},  # what is estimated below
                "max_length": case.length,
                "precision": case.precision,
                "gradient_checkpointing": "checkpointing" in case.more,
                "gradient_accumulation_steps": accumulation,
                "saving": {"strategy": "end"},
            }
        ),
    )
    run = RunDirectory(folder / "run")
    run.write_spec(spec)
    with run.log_file.open("ab") as log:
        trainer = subprocess.Popen(
            [sys.executable, "-m", "bento_service.training", str(run.path), "--attempt", "1"],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        _, status, usage = os.wait4(trainer.pid, 0)
        trainer.returncode = os.waitstatus_to_exitcode(status)
    if trainer.returncode != 0:
        raise SystemExit("\n".join(run.log_tail()))
    batch = padded_batch(case.length, sequences=2, size=case.batch_size)
    expected = estimate(spec, ModelShape.of(model), spec.options.precision, "cpu", batch)  # type: ignore[arg-type]
    return expected.total, usage.ru_maxrss * 1024


def pair(number: int, length: int) -> dict[str, str]:
    """A pair of which at least one sequence has ``length`` tokens or more, and not all have: so batches are masked."""
    return {
        "prompt": " the" * (length // 2),
        "chosen": " a" * (length // 2 + 8),
        "rejected": " one" * (length // 4 + number % 7),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--case", action="append", help="only these cases")
    arguments = parser.parse_args()
    table = Table("case", "estimated GB", "measured GB", "error", title=f"peak memory, {arguments.model.name}, CPU")
    for text in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            expected, measured = measure(Case.parse(text), arguments.model.absolute(), Path(folder))
        error = f"{expected / measured - 1:+.0%}"
        print(f"{text}: {expected / 1e9:.2f} {measured / 1e9:.2f} {error}", file=sys.stderr, flush=True)
        table.add_row(text, f"{expected / 1e9:.2f}", f"{measured / 1e9:.2f}", error)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
