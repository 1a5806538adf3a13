"""What a run's data come to, found out before it: ``python -m bento_service.training.preview``.

Reads an ``Order`` as one line of standard input, checks the data files, counts their tokens as the recipe will, and
writes a ``Preview`` to standard output. A process of its own, because the tokenizers are too heavy for the service;
it ends when its standard input is closed, and so with whoever started it.
"""

import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bento_service.errors import InvalidRequest
from bento_service.training.dataset_report import DatasetReport, Row
from bento_service.training.preferences import check_file, load_rows, numbered_rows
from bento_service.training.refused_rows import is_refusal, learns_replies_only, require_accepted
from bento_service.training.row_bounds import Bounds
from bento_service.training.schedule import Schedule
from bento_service.training.spec import TrainingSpec
from bento_service.training.token_statistics import TokenStatistics, TokenTally
from bento_service.training.tokenization import BATCH_ROWS, batches, row_tokens

# This part of the time is used before any row is passed over, so that what is soon done is never a sample.
_UNHURRIED = 0.2


class Order(BaseModel):
    """``seconds`` bounds the time in which rows are tokenized; ``cap`` the problems that are listed of a file."""

    model_config = ConfigDict(frozen=True)

    spec: TrainingSpec
    bounds: Bounds
    cap: int
    seconds: float


class Refusal(BaseModel):
    """Why the run would fail."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    param: str | None


class Run(BaseModel):
    """What the run will do."""

    model_config = ConfigDict(frozen=True)

    rows: int = Field(description="Rows that are trained on.")
    evaluation_rows: int = Field(description="Rows that each evaluation scores.")
    steps: int = Field(description="Optimizer steps in all.")
    steps_per_epoch: int
    estimated: bool = Field(
        description="Rows were sampled, or are packed: steps and tokens are estimates. Else they are exact."
    )
    tokens: int = Field(description="Tokens trained in all, padding not counted.")
    padded_tokens: int = Field(description="The same, padding counted.")


class Preview(BaseModel):
    """``tokens`` and ``run`` are None when the data, or the model, cannot be trained on: see ``refusals``."""

    model_config = ConfigDict(frozen=True)

    training: dict[str, Any]  # DatasetReport.to_json
    validation: dict[str, Any] | None
    refusals: list[Refusal]
    tokens: TokenStatistics | None = None  # of the training rows
    validation_tokens: TokenStatistics | None = None  # of the validation file, or of the rows held out
    run: Run | None = None


def preview(order: Order) -> Preview:
    """Check and count. Whatever a user can mend is among the refusals; nothing of it is raised."""
    spec = order.spec
    training, refusal = _checked(order, spec.training_file, "training_file")
    refusals = [] if refusal is None else [refusal]
    validation = None
    if spec.validation_file is not None:
        validation, refusal = _checked(order, spec.validation_file, "validation_file")
        refusals += [] if refusal is None else [refusal]
    found = Preview(
        training=training.to_json(),
        validation=None if validation is None else validation.to_json(),
        refusals=refusals,
    )
    if refusals:
        return found
    try:
        return found.model_copy(update=_count(order, training, validation))
    except InvalidRequest as error:
        return found.model_copy(update={"refusals": [refusal_of(error)]})


def refusal_of(error: InvalidRequest) -> Refusal:
    return Refusal(code=error.code, message=error.message, param=error.param)


def _checked(order: Order, file: str, param: str) -> tuple[DatasetReport, Refusal | None]:
    report = check_file(Path(file), method=order.spec.method, cap=order.cap, bounds=order.bounds)
    if report.refusal is None:
        return report, None
    return report, Refusal(code="invalid_dataset", message=f"{param} {report.refusal}", param=param)


def _count(order: Order, training: DatasetReport, validation: DatasetReport | None) -> dict[str, Any]:
    from bento_service.training.models import load_tokenizer

    spec = order.spec
    evaluation = spec.options.evaluation
    files = [(spec.training_file, training), (spec.validation_file, validation)]
    conversational = any(_is_conversational(Path(file)) for file, _ in files if file is not None)
    folder = Path(spec.model_path) if spec.model_path is not None else None
    tokenizer = load_tokenizer(
        spec.model, folder, conversational=conversational, trust_remote_code=spec.trust_remote_code
    )
    replies_only = learns_replies_only(spec)

    # Each file gets its part of the time.
    whole = sum(report.rows for _, report in files if report is not None)
    seconds = order.seconds / whole
    held_out = set(_held_out(training.rows, evaluation.split, spec.seed)) if evaluation.split > 0 else set()
    tally, held_tally = _tallies(spec)

    def add_up(
        file: str, param: str, report: DatasetReport, tally: TokenTally, held_tally: TokenTally, held_out: set[int]
    ) -> None:
        """Tokenize the file's rows, or as many of them, evenly spread, as the time allows."""
        for first, batch, weight in paced(load_rows(Path(file)), report.rows, seconds * report.rows):
            try:
                tokens = row_tokens(batch, tokenizer, replies_only=replies_only)
            except Exception as error:
                if is_refusal(error):
                    rows = itertools.islice(numbered_rows(Path(file)), first, first + len(batch))
                    require_accepted(rows, param, spec, tokenizer, cause=error)
                raise
            for number, row in enumerate(tokens, start=first):
                (held_tally if number in held_out else tally).add(row, weight)

    add_up(spec.training_file, "training_file", training, tally, held_tally, held_out)
    tokens = tally.statistics(training.rows - len(held_out))
    evaluated = held_tally.statistics(len(held_out)) if held_out else None
    if validation is not None and spec.validation_file is not None:
        _, tally = _tallies(spec)
        add_up(spec.validation_file, "validation_file", validation, tally, tally, set())
        evaluated = tally.statistics(validation.rows)
    for statistics, param in ((tokens, "training_file"), (evaluated, spec.validation_file and "validation_file")):
        if statistics is not None and not statistics.trained:
            most = f"{spec.options.max_length} tokens"
            long = f"the prompt of every row alone has {most} or more"
            if spec.method == "reward":
                long = f"every pair has more than {most}"
            raise InvalidRequest(
                f"{param or 'training_file'}: {long}: raise max_length",
                param="trl.max_length",
            )
    return {"tokens": tokens, "validation_tokens": evaluated, "run": run_of(spec, tokens, evaluated)}


def run_of(spec: TrainingSpec, tokens: TokenStatistics, evaluated: TokenStatistics | None) -> Run:
    """The steps of the recipe's own schedule, and the tokens that they see."""
    packed = spec.method == "supervised" and spec.options.sft.packing
    # Best-fit packing leaves little room unused; how much depends on the lengths.
    examples = math.ceil(tokens.tokens / spec.options.max_length) if packed else tokens.trained
    schedule = Schedule.of(spec, rows=examples, evaluated=evaluated is not None)
    unlimited = spec.options.model_copy(update={"max_steps": None, "max_steps_per_epoch": None})
    whole = Schedule.of(spec.model_copy(update={"options": unlimited}), rows=examples, evaluated=False)
    passes = schedule.total_steps / whole.steps_per_epoch
    evaluation = spec.options.evaluation
    evaluation_rows = 0 if schedule.evaluation is None or evaluated is None else evaluated.trained
    if evaluation.max_steps is not None:
        evaluation_rows = min(evaluation_rows, evaluation.max_steps * (evaluation.batch_size or spec.batch_size))
    return Run(
        rows=tokens.trained,
        evaluation_rows=evaluation_rows,
        steps=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        estimated=packed or tokens.tokenized_rows < tokens.rows,
        tokens=round(passes * tokens.tokens),
        padded_tokens=round(passes * (tokens.tokens if packed else tokens.padded_tokens)),
    )


def paced(rows: Iterator[Row], count: int, seconds: float) -> Iterator[tuple[int, list[Row], float]]:
    """Batches of rows with the index of their first row, and the number of rows that each of them stands for.

    Behind schedule, rows are passed over until the share of the rows that are read is the share of the time that is
    used; the batch that comes next stands for them too. The consumer's work between two batches counts as time.
    """
    start = time.monotonic()
    read = 0

    def counted() -> Iterator[Row]:
        nonlocal read
        for row in rows:
            read += 1
            yield row

    source = counted()
    passed = 0
    while True:
        used = (time.monotonic() - start) / seconds
        goal = count * (used - _UNHURRIED) / (1 - _UNHURRIED)
        # The last rows are always read, so that the end of a file is heard of too.
        while read < min(goal, count - BATCH_ROWS) and next(source, None) is not None:
            passed += 1
        first = read
        batch = next(batches(source), None)
        if batch is None:
            return
        yield first, batch, (passed + len(batch)) / len(batch)
        passed = 0


def _tallies(spec: TrainingSpec) -> tuple[TokenTally, TokenTally]:
    evaluated = spec.options.evaluation.batch_size or spec.batch_size
    keeps_end = spec.method == "dpo" and spec.options.dpo.truncation_mode == "keep_end"
    cuts = spec.method != "reward"
    return (
        TokenTally(spec.options.max_length, spec.batch_size, keeps_end=keeps_end, cuts=cuts),
        TokenTally(spec.options.max_length, evaluated, keeps_end=keeps_end, cuts=cuts),
    )


def _held_out(rows: int, fraction: float, seed: int) -> list[int]:
    """Indices of the rows that the recipe holds out."""
    from datasets import Dataset, disable_progress_bars

    from bento_service.training.data import hold_out

    disable_progress_bars()
    _, held_out = hold_out(Dataset.from_dict({"row": range(rows)}), fraction, seed)
    return list(held_out["row"])


def _is_conversational(file: Path) -> bool:
    return any(isinstance(value, list) for value in next(load_rows(file)).values())


def _end_with_caller() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    order = Order.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_caller, name="end-with-caller", daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Libraries that print must not print into the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer.write(preview(order).model_dump_json())
    answer.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for the thread that reads
