"""The DPO recipe: from a specification to the final checkpoint, with TRL's DPOTrainer on packed batches.

Read ``run`` from top to bottom; it is what a plain TRL script does (``examples/dpo_script.py``), plus events,
checkpoints that survive a kill, and a stop on request. The numbers are TRL's: same data, seed and settings give
the script's losses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, disable_progress_bars
from trl import DPOConfig

from bento_service.errors import InvalidDataset
from bento_service.training.arguments import shared_arguments
from bento_service.training.data import read_data
from bento_service.training.devices import choose_precision, find_device
from bento_service.training.events import EventWriter
from bento_service.training.lora import lora_config
from bento_service.training.model_shape import ModelShape
from bento_service.training.models import load_model, load_tokenizer
from bento_service.training.packed_dpo import PackedDPOTrainer
from bento_service.training.packing import PackedBatch
from bento_service.training.quantization import Quantization
from bento_service.training.reference import ReferenceCache, precompute_pays
from bento_service.training.row_budget import free_memory, row_tokens
from bento_service.training.run_directory import RunDirectory
from bento_service.training.session import train
from bento_service.training.spec import TrainingSpec
from bento_service.training.stop import StopSwitch
from bento_service.training.throughput import BatchSize, CountingTrainer

# FlexAttention works in blocks of so many tokens.
CUDA_ROW_MULTIPLE = 128


class CountingDPOTrainer(CountingTrainer, PackedDPOTrainer):
    sequences_per_row = 2  # the chosen and the rejected reply, each after the prompt

    def further_passes(self) -> int:
        return 0 if self.args.precompute_ref_log_probs else 1  # the reference's

    def batch_size(self, inputs: Mapping[str, Any]) -> BatchSize:
        size = super().batch_size(inputs)
        if "packed" not in inputs:
            return size
        packed: PackedBatch = inputs["packed"]
        return size._replace(computed=packed.tokens, padding=packed.padding)


def run(
    spec: TrainingSpec, run: RunDirectory, events: EventWriter, stop: StopSwitch
) -> Literal["succeeded", "stopped"]:
    """Train as specified, continuing from the run's newest checkpoint if it has one.

    Returns "stopped" when a stop was requested before the last step and its evaluation were done. Raises
    InvalidDataset, InvalidRequest, UnknownModel or TrainingFailed for causes the user can mend.
    """
    disable_progress_bars()
    options = spec.options
    device = find_device(spec.device)
    precision = choose_precision(options.precision, device)
    quantization = Quantization.of(options, device, precision)

    events.write("message", f"reading the data; training on {device.kind} in {precision}")
    data = read_data(spec, run)

    events.write("message", f"loading model {spec.model}")
    folder = Path(spec.model_path) if spec.model_path is not None else None
    tokenizer = load_tokenizer(
        spec.model, folder, conversational=data.conversational, trust_remote_code=spec.trust_remote_code
    )
    model = load_model(spec.model, folder, trust_remote_code=spec.trust_remote_code, quantization=quantization)

    events.write("message", f"tokenizing {len(data.train)} pairs")
    shape = ModelShape.of(folder) if folder is not None else None
    precompute = precompute_pays(spec, rows=len(data.train))
    trainer = CountingDPOTrainer(
        model=model,
        args=DPOConfig(
            **shared_arguments(spec, run, device, precision),
            beta=spec.beta,
            loss_type=list(options.dpo.loss_type),
            loss_weights=options.dpo.loss_weights,
            label_smoothing=options.dpo.label_smoothing,
            f_divergence_type=options.dpo.f_divergence_type,
            f_alpha_divergence_coef=options.dpo.f_alpha_divergence_coef,
            ld_alpha=options.dpo.ld_alpha,
            discopop_tau=options.dpo.discopop_tau,
            use_weighting=options.dpo.use_weighting,
            precompute_ref_log_probs=precompute,
            truncation_mode=options.dpo.truncation_mode,
            # TRL's disable_dropout also turns the adapter's dropout off, so it is left out when that is wanted.
            disable_dropout=options.tuning == "full" or options.lora.dropout == 0,
        ),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=lora_config(options.lora, model) if options.tuning == "lora" else None,
        pack=options.dpo.packing,
        max_row_tokens=row_tokens(spec, shape, device.kind, precision, free=free_memory(device)),
        row_multiple=CUDA_ROW_MULTIPLE if device.kind == "cuda" else 1,
        reference_cache=ReferenceCache(Path(spec.reference_cache)) if spec.reference_cache is not None else None,
    )
    report_packing(trainer, events)
    report_lengths(trainer.train_dataset, len(data.train), options.max_length, "training_file", events)
    if data.evaluation is not None:
        report_lengths(trainer.eval_dataset, len(data.evaluation), options.max_length, "validation_file", events)
    return train(trainer, spec, run, events, stop)


def report_packing(trainer: PackedDPOTrainer, events: EventWriter) -> None:
    """Say whether batches are packed, and why not."""
    if trainer.fallback is not None:
        events.write("message", f"batches are padded, as by TRL: {trainer.fallback}", packing=False)
    else:
        checked = ""
        if trainer.check is not None:
            checked = (
                f"; checked on {trainer.check.pairs} pairs in {trainer.check.seconds:.1f} s: a token's "
                f"log-probability differs from TRL's by at most {trainer.check.difference:.1g}"
            )
        tokens = trainer.max_row_tokens
        events.write("message", f"batches are packed, {tokens} tokens at a time{checked}", packing=True)
    for name in trainer.reference_reused:
        events.write(
            "message", f"the reference model's log-probabilities of the {name} data are those of an earlier job"
        )


def report_lengths(dataset: Dataset, given: int, max_length: int, param: str, events: EventWriter) -> None:
    """Warn of pairs that TRL leaves out or cuts because of ``max_length``. Raises InvalidDataset when none is left."""
    dropped, cut = given - len(dataset), 0
    for pairs in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(batch_size=1000):
        lengths = zip(*(map(len, column) for column in pairs.values()), strict=True)
        cut += sum(prompt + max(chosen, rejected) > max_length for prompt, chosen, rejected in lengths)
    if not len(dataset):
        raise InvalidDataset(
            f"{param}: the prompt of every pair alone has {max_length} tokens or more: raise max_length",
            param=param,
        )
    if dropped:
        events.write(
            "message",
            f"{param}: {dropped} of {given} pairs are left out: the prompt alone has {max_length} tokens or more",
            level="warn",
        )
    if cut:
        events.write(
            "message",
            f"{param}: {cut} of {given} pairs are longer than {max_length} tokens: they are cut",
            level="warn",
        )
