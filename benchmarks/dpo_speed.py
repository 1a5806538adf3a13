"""DPO on packed batches against plain TRL, in alternating runs of one process each.

    python benchmarks/dpo_speed.py MODEL [--data FILE] [--pairs 16] [--rounds 2] [--cases full-fp32 lora-fp32 ...]

MODEL is a folder. FILE has preference pairs, JSON Lines, gzipped or not, in any form the service takes; without it
pairs are made up with the lengths of HH-RLHF's harmless set. Three trainers see the same model, pairs, order, batch
size, precision and seed:

    packed   this project's trainer
    trl      TRL's DPOTrainer, the same settings; gradient checkpointing is off, which is its faster setting
    stack    the recipe of Llama Stack's own providers: the prompt once more before each reply, a second model kept

Time is from the loaded model to the last step: tokenizing, the start-up check and reference scores included. CPU is
the process's CPU seconds over the same span, which tell more than wall time on a machine that others use too. The
last two columns are the largest difference to trl's losses and, relative, to its gradients' norms: in the first step
every exact DPO has the loss log 2, so there the gradient tells (stack trains on another text). The share of the
machine's matrix-product speed is of a packed run that sees the pairs three times, without the first.

bf16 is left out on a processor that has none, unless it is asked for by --cases.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bento_service.jobs.launcher import trainer_environment

CASES = ("full-fp32", "lora-fp32", "full-bf16", "lora-bf16")
TRAINERS = ("packed", "trl", "stack")
# Words of prompt and reply in HH-RLHF harmless (1,500 pairs): the mean of their logarithms, and its deviation.
PROMPT_WORDS, REPLY_WORDS = (3.9, 0.9), (3.2, 0.9)


class Killed(Exception):
    """A run's process was ended by SIGKILL."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[case for case in CASES if is_in_hardware(case)])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(json.loads(options.worker))))
        return
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(pair) + "\n" for pair in load_pairs(options.data, options.pairs)))
        for case in options.cases:
            compare(case, pairs, options)


def is_in_hardware(case: str) -> bool:
    """Whether the precision is one of the processor's, or, where there is a GPU, of the GPU's."""
    if case.endswith("fp32") or shutil.which("nvidia-smi"):
        return True
    processor = Path("/proc/cpuinfo")
    flags = processor.read_text().split() if processor.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def load_pairs(data: Path | None, count: int) -> list[dict[str, Any]]:
    """``count`` pairs with a prompt of their own."""
    if data is None:
        rng = random.Random(0)

        def text(mean: float, deviation: float) -> str:
            words = max(1, round(rng.lognormvariate(mean, deviation)))
            return " ".join(rng.choice(["what", "can", "you", "tell", "me", "about", "this"]) for _ in range(words))

        return [
            {"prompt": text(*PROMPT_WORDS), "chosen": " " + text(*REPLY_WORDS), "rejected": " " + text(*REPLY_WORDS)}
            for _ in range(count)
        ]
    from trl import extract_prompt

    with gzip.open(data, "rt") if data.suffix == ".gz" else data.open() as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    return [row if "prompt" in row else extract_prompt(row) for row in rows]


def compare(case: str, pairs: Path, options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.trainers}
    for number in range(1, options.rounds + 1):
        for name in list(results):
            print(f"{case}, round {number} of {options.rounds}: {name} ...", end=" ", flush=True)
            try:
                results[name].append(measure(name, case, pairs, options))
            except Killed:
                del results[name]
                print("killed, as the system does when memory runs out: left out", flush=True)
            else:
                print(f"{results[name][-1]['wall']:.1f} s", flush=True)
    report(case, results)
    if "packed" in results:
        limit = measure("packed", case, pairs, options, passes=3)
        needed, reached = limit["flops"], limit["flops"] / limit["later_pass"]
        print(
            f"limit: {limit['matmul'] / 1e9:.0f} GFLOP/s in matrix products of {options.threads} threads. The real "
            f"tokens of a pass over the pairs need {needed / 1e12:.2f} TFLOP; packed, after the first pass, took "
            f"{limit['later_pass']:.1f} s: {reached / 1e9:.0f} GFLOP/s, {reached / limit['matmul']:.0%} of the limit. "
            f"Padding: {limit['padding']:.1%}."
        )


def measure(name: str, case: str, pairs: Path, options: argparse.Namespace, passes: int = 1) -> dict[str, Any]:
    """``run`` in a process of its own. Raises Killed."""
    job = {
        "trainer": name, "case": case, "model": str(options.model), "pairs": str(pairs), "passes": passes,
        "batch_size": options.batch_size, "max_length": options.max_length, "threads": options.threads,
    }  # fmt: skip
    command = [sys.executable, __file__, str(options.model), "--worker", json.dumps(job)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    if name == "packed":  # the allocator's settings of a job's trainer
        trainer = trainer_environment((), "cpu")
        environment |= {key: value for key, value in trainer.items() if key.startswith("MALLOC_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        raise Killed
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(case: str, results: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(title=case)
    for heading in (
        "trainer",
        "wall s",
        "CPU s",
        "pairs/s",
        "tokens/s",
        "peak GB",
        "slower",
        "by CPU",
        "loss differs",
        "gradient",
    ):
        table.add_column(heading, justify="left" if heading == "trainer" else "right")
    ours = results.get("packed")
    for name, runs in results.items():
        wall, cpu = (statistics.median(run[key] for run in runs) for key in ("wall", "cpu"))
        slower = by_cpu = "-"
        if ours:
            slower, by_cpu = (
                spread([run[key] / own[key] for run, own in zip(runs, ours, strict=True)]) for key in ("wall", "cpu")
            )
        against = results.get("trl", runs)[0]
        difference = max(abs(one - other) for one, other in zip(runs[0]["losses"], against["losses"], strict=True))
        norms = max(abs(one / other - 1) for one, other in zip(runs[0]["norms"], against["norms"], strict=True))
        table.add_row(
            name, f"{wall:.1f}", f"{cpu:.1f}", f"{runs[0]['pairs'] / wall:.2f}", f"{runs[0]['tokens'] / wall:.0f}",
            f"{max(run['peak'] for run in runs) / 1e9:.2f}", slower, by_cpu, f"{difference:.1e}",
            f"{norms:.1e}",
        )  # fmt: skip
    Console(width=120).print(table)


def spread(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{statistics.median(ratios):.2f}" + (f" ({low:.2f}-{high:.2f})" if len(ratios) > 1 else "")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One trainer on the pairs, in this process."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from bento_service.training.packed_dpo import PackedDPOTrainer

    datasets.disable_progress_bars()
    torch.set_num_threads(job["threads"])
    tuning, precision = job["case"].split("-")
    on_gpu = torch.cuda.is_available()
    matmul = matmul_speed(torch.bfloat16 if precision == "bf16" else torch.float32)
    rows = [json.loads(line) for line in Path(job["pairs"]).read_text().splitlines()]
    if job["trainer"] == "stack":
        rows = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended.append(time.monotonic())

    clock = Clock()
    model = load()
    began, cpu = time.monotonic(), time.process_time()
    ours = job["trainer"] == "packed"
    settings: dict[str, Any] = {}
    if ours:
        settings = {"max_row_tokens": 8192 if on_gpu else 2048, "row_multiple": 128 if on_gpu else 1}
    elif job["trainer"] == "stack":
        settings = {"ref_model": load()}
    with tempfile.TemporaryDirectory() as output:
        trainer = (PackedDPOTrainer if ours else DPOTrainer)(
            model=model,
            args=DPOConfig(
                output_dir=output, seed=42, use_cpu=not on_gpu, bf16=precision == "bf16",
                per_device_train_batch_size=job["batch_size"], max_length=job["max_length"], learning_rate=1e-5,
                num_train_epochs=job["passes"], gradient_checkpointing=False, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True,
                # The recipe's own choice for full fine-tuning; TRL's default is to keep the second model.
                precompute_ref_log_probs=ours and tuning == "full",
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if tuning == "lora"
            else None,
            callbacks=[clock],
            **settings,
        )  # fmt: skip
        if ours and trainer.fallback is not None:
            raise SystemExit(f"not packed: {trainer.fallback}")
        trainer.train()
        ended = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    tokens, computed, flops = count(trainer, ours)
    steps = [last - first for first, last in zip(clock.began, clock.ended, strict=True)]
    later = steps[len(steps) // job["passes"] :]
    return {
        "wall": ended - began, "cpu": time.process_time() - cpu, "peak": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "pairs": len(rows), "tokens": tokens, "padding": 1 - tokens / computed if ours else None, "flops": flops,
        "matmul": matmul, "later_pass": sum(later) / (job["passes"] - 1) if later else None,
    }  # fmt: skip


def count(trainer: Any, ours: bool) -> tuple[int, int, float]:
    """Real tokens of the pairs, each prompt once; computed ones; FLOPs of the training steps that the first need.

    Two FLOPs a weight and token of a forward pass, four of its backward pass (two where weights are frozen), two of
    the reference's forward pass unless it was scored before; the vocabulary's weights for tokens of replies only.
    """
    import torch

    from bento_service.training.packing import PackedCollator

    collator = trainer.data_collator
    if not ours:
        return sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
                   for row in trainer.train_dataset), 0, 0.0  # fmt: skip
    assert isinstance(collator, PackedCollator)
    packed = collator(list(trainer.train_dataset))["packed"]
    tokens = packed.tokens - packed.padding
    scored = sum(len(row.sources) for row in packed.rows)
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    linear = sum(
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not base.get_output_embeddings()
    )
    head = base.get_output_embeddings().weight.numel()
    frozen = base is not trainer.model
    passes = 2 + (2 if frozen else 4) + (0 if trainer.precompute_ref_logps else 2)
    return tokens, packed.tokens, float(passes * (linear * tokens + head * scored))


def matmul_speed(dtype: Any) -> float:
    """FLOP/s of products [2048, 1024] x [1024, 2048], the best of some."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    one = torch.randn(2 * size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        began = time.monotonic()
        product = one @ one.T
        product[0, 0].item()
        best = min(best, time.monotonic() - began)
    return 2 * (2 * size) * size * (2 * size) / best


if __name__ == "__main__":
    main()
