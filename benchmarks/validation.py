"""How fast data files are checked, and in how much memory: ``python benchmarks/validation.py [--megabytes 200]``.

Writes preference pairs of about 2 kB to files of each container, checks each in a process of its own, and prints
megabytes of file a second of CPU time, and that process's peak resident memory (of Parquet
without the process that decodes).
"""

import argparse
import csv
import gzip
import json
import multiprocessing
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bento_service.training.dataset_report import Method  # noqa: E402

WORDS = [
    "the",
    "a",
    "model",
    "answer",
    "question",
    "why",
    "how",
    "is",
    "was",
    "good",
    "bad",
    "reward",
    "pair.\n",
    "it",
]
FOREIGN = ["café", "“token”", "数据"]
WORDS_A_TEXT = 130
FOREIGN_EVERY = 4  # one in this many rows is not ASCII: its text takes twice the memory and is slower to parse


def text_pairs() -> Iterator[dict[str, object]]:
    choice = random.Random(0)
    for number in count():
        words = WORDS + FOREIGN if number % FOREIGN_EVERY == 0 else WORDS
        yield {column: " ".join(choice.choices(words, k=WORDS_A_TEXT)) for column in ("prompt", "chosen", "rejected")}


def message_pairs() -> Iterator[dict[str, object]]:
    for row in text_pairs():
        yield {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }


def conversations() -> Iterator[dict[str, object]]:
    for row in message_pairs():
        yield {"messages": [*row["prompt"], *row["chosen"]]}  # type: ignore[misc]


def transcript_pairs() -> Iterator[dict[str, object]]:
    for row in text_pairs():
        prompt = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
        yield {"chosen": prompt + str(row["chosen"]), "rejected": prompt + str(row["rejected"])}


def write_jsonl(path: Path, rows: Iterator[dict[str, object]], megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if file.tell() >= megabytes * 10**6:
                return


def write_array(path: Path, rows: Iterator[dict[str, object]], megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("[" + json.dumps(next(rows), ensure_ascii=False))
        while file.tell() < megabytes * 10**6:
            file.write(",\n" + json.dumps(next(rows), ensure_ascii=False))
        file.write("]")


def write_csv(path: Path, rows: Iterator[dict[str, object]], megabytes: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        first = next(rows)
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerow(first)
        while file.tell() < megabytes * 10**6:
            writer.writerow(next(rows))


def write_parquet(path: Path, rows: Iterator[dict[str, object]], megabytes: int) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    table = pyarrow.Table.from_pylist(list(islice(rows, megabytes * 1000)))
    pyarrow.parquet.write_table(table, path, row_group_size=100_000, compression="none", use_dictionary=False)


def write_gzipped(path: Path, rows: Iterator[dict[str, object]], megabytes: int) -> None:
    plain = path.with_suffix(".plain")
    write_jsonl(plain, rows, megabytes)
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=1) as packed:
        shutil.copyfileobj(source, packed)
    plain.unlink()


CASES: dict[str, tuple[Callable[[Path, Iterator[dict[str, object]], int], None], Callable[[], Iterator]]] = {
    "JSON Lines, text": (write_jsonl, text_pairs),
    "JSON Lines, messages": (write_jsonl, message_pairs),
    "JSON Lines, transcripts": (write_jsonl, transcript_pairs),
    "JSON Lines, chat": (write_jsonl, conversations),
    "JSON array, text": (write_array, text_pairs),
    "CSV, text": (write_csv, text_pairs),
    "Parquet, messages": (write_parquet, message_pairs),
    "JSON Lines, text, gzipped": (write_gzipped, text_pairs),
}


@dataclass(frozen=True)
class Measurement:
    rows: int
    seconds: float  # of CPU, least of the rounds
    resident: int  # peak, bytes


def measure(path: Path, method: Method, rounds: int, results: "multiprocessing.SimpleQueue[Measurement]") -> None:
    from bento_service.training.preferences import check_file

    seconds = []
    for _ in range(rounds):
        start = processor_seconds()
        report = check_file(path, method=method)
        seconds.append(processor_seconds() - start)
        if report.total_problems:
            raise SystemExit(f"{path.name}: {report.problems[0]}")
    results.put(Measurement(rows=report.rows, seconds=min(seconds), resident=peak_resident()))


def processor_seconds() -> float:
    """Of this process and of those it waited for: Parquet is decoded in one."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def peak_resident() -> int:
    """Of this process since it began, bytes. (ru_maxrss would count what its parent had when it was forked.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="size of each file")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; may be repeated")
    options = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")  # a fresh process: its peak memory is the check's own
    table = Table("file", "MB", "rows", "MB/s", "µs a row", "peak RSS, MB")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.case or CASES:
            write, rows = CASES[name]
            path = Path(folder) / "rows"
            method: Method = "supervised" if rows is conversations else "dpo"
            write(path, rows(), options.megabytes)
            results = spawn.SimpleQueue()
            process = spawn.Process(target=measure, args=(path, method, options.rounds, results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name}: the check ended with {process.exitcode}")
            found = results.get()
            # Of a gzipped file what it unpacks to, which is what is checked.
            size = (options.megabytes * 10**6 if write is write_gzipped else path.stat().st_size) / 1e6
            table.add_row(
                name,
                f"{size:.0f}",
                str(found.rows),
                f"{size / found.seconds:.0f}",
                f"{found.seconds / found.rows * 1e6:.1f}",
                f"{found.resident / 1e6:.0f}",
            )
            path.unlink()
    Console().print(table)


if __name__ == "__main__":
    main()
