"""Stock and packed DPO trainers over the same tiny model and pairs."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from bento_service.training.devices import Device
from bento_service.training.models import load_model
from bento_service.training.packed_dpo import PackedDPOTrainer
from bento_service.training.quantization import Quantization
from bento_service.training.reference import ReferenceCache

WORDS = [
    "what",
    "is",
    "the",
    "capital",
    "of",
    "france",
    "paris",
    "boil",
    "an",
    "egg",
    "for",
    "eight",
    "minutes",
    "please",
]
Tuning = Literal["full", "lora", "dora", "nf4", "int8"]


def make_pairs(count: int, *, seed: int = 0, prompt: int = 20, reply: int = 15) -> list[dict[str, str]]:
    """Ragged pairs; some prompts are empty, some replies are one word, some begin alike."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    pairs = []
    for number in range(count):
        start = text(3) + " " if number % 3 == 0 else ""
        question = "" if number % 7 == 5 else text(rng.randint(1, prompt)) + ":"
        answers = [start + text(1 if number % 5 == side else rng.randint(2, reply)) for side in range(2)]
        pairs.append({"prompt": question, "chosen": " " + answers[0], "rejected": " " + answers[1]})
    return pairs


def make_trainer(
    folder: Path,
    output: Path,
    *,
    packed: bool,
    pairs: Sequence[dict[str, str]],
    tuning: Tuning = "full",
    max_row_tokens: int = 150,
    row_multiple: int = 1,
    reference_cache: ReferenceCache | None = None,
    falls_back: bool = False,
    **settings: Any,
) -> DPOTrainer:
    """A trainer in float32 on the CPU; ``settings`` go to DPOConfig."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 48,
        "max_steps": 6,
        "gradient_checkpointing": False,
    }
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=tuning == "dora")
    kind = PackedDPOTrainer if packed else DPOTrainer
    quantization = None
    if tuning in ("nf4", "int8"):
        quantization = Quantization(name=tuning, precision="fp32", device=Device(kind="cpu", has_bf16=True))
    own: dict[str, Any] = {}
    if packed:
        own = {"max_row_tokens": max_row_tokens, "row_multiple": row_multiple, "reference_cache": reference_cache}
    trainer = kind(
        model=load_model("tiny", folder, quantization=quantization),
        args=DPOConfig(
            output_dir=str(output), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            **defaults | settings,
        ),
        train_dataset=Dataset.from_list(list(pairs)),
        eval_dataset=Dataset.from_list(list(pairs[:6])),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=None if tuning == "full" else lora,
        **own,
    )  # fmt: skip
    if packed:
        assert (trainer.fallback is not None) == falls_back
    return trainer


def perturb(model: torch.nn.Module) -> None:
    """Move the trained weights away from the reference's, the same way each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def loss_and_gradients(trainer: DPOTrainer, examples: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor], dict]:
    """One batch through the trainer's own step: its loss, all gradients, and the metrics it would log."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, trainer.data_collator(examples))
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters() if parameter.grad is not None]
    return loss.item(), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}
