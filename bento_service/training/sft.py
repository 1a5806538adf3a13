"""The recipe of supervised fine-tuning: from a specification to the final checkpoint, with TRL's SFTTrainer.

Read ``run`` from top to bottom; it is what a plain TRL script does (``examples/sft_script.py``), plus events,
checkpoints that survive a kill, and a stop on request. The numbers are TRL's: same data, seed and settings give
the script's losses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from bento_service.errors import InvalidDataset, InvalidRequest
from bento_service.training.arguments import shared_arguments
from bento_service.training.assistant_turns import tokenize_chat
from bento_service.training.data import read_data
from bento_service.training.devices import choose_precision, find_device
from bento_service.training.events import EventWriter
from bento_service.training.lora import lora_config
from bento_service.training.models import load_model, load_tokenizer
from bento_service.training.quantization import Quantization
from bento_service.training.run_directory import RunDirectory
from bento_service.training.session import train
from bento_service.training.spec import TrainingSpec
from bento_service.training.stop import StopSwitch
from bento_service.training.throughput import CountingTrainer


class CountingSFTTrainer(CountingTrainer, SFTTrainer):
    def loss_items(self, inputs: Mapping[str, Any]) -> int:
        return int((inputs["labels"][..., 1:] != -100).sum())

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        packing: bool,
        formatting_func: None,
        dataset_name: str,
    ) -> Dataset:
        # Rows are cut first, and left out when nothing to learn remains; TRL does so only where it does not pack.
        tokenized = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        if not packing or len(tokenized) == 0:
            return tokenized
        return super()._prepare_dataset(tokenized, processing_class, args, True, formatting_func, dataset_name)


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

    if options.sft.packing:
        require_rows_apart(model)

    events.write("message", f"tokenizing {len(data.train)} rows")
    rows, held_out = data.train, data.evaluation
    if options.sft.completion_only_loss:
        # Of rows of prompt and completion TRL finds the completion; of conversations only some templates let it.
        rows = tokenize_chat(rows, tokenizer) if "messages" in rows.column_names else rows
        if held_out is not None and "messages" in held_out.column_names:
            held_out = tokenize_chat(held_out, tokenizer)
    trainer = CountingSFTTrainer(
        model=model,
        args=SFTConfig(
            **shared_arguments(spec, run, device, precision),
            loss_type=options.sft.loss_type,
            completion_only_loss=options.sft.completion_only_loss,
            packing=options.sft.packing,
            packing_strategy="bfd",
            # Rows are evaluated one by one, so that packing changes no evaluation.
            eval_packing=False,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(options.lora, model) if options.tuning == "lora" else None,
    )
    report_lengths(trainer.train_dataset, len(data.train), spec, "training_file", events)
    if data.evaluation is not None:
        report_lengths(trainer.eval_dataset, len(data.evaluation), spec, "validation_file", events)
    return train(trainer, spec, run, events, stop)


def require_rows_apart(model: PreTrainedModel) -> None:
    """Raises InvalidRequest for a model in which a row of a pack sees the rows before it.

    Where a batch has position ids, no mask and no cache, transformers' attention keeps the rows of a pack apart; a
    recurrent model, or one that brings its own attention, may not.
    """
    first, second = torch.arange(1, 7)[None], torch.arange(7, 12)[None]
    positions = torch.cat([torch.arange(first.shape[1]), torch.arange(second.shape[1])])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = model(input_ids=second, use_cache=False).logits
    difference = (packed[:, first.shape[1] :] - alone).abs().max()
    if not difference <= 1e-3 * alone.abs().max():  # rounding is a thousandth of that, another context far more
        raise InvalidRequest(
            "this model does not keep the rows of a packed sequence apart: set sft.packing to false",
            param="sft.packing",
        )


def report_lengths(dataset: Dataset, given: int, spec: TrainingSpec, param: str, events: EventWriter) -> None:
    """Warn of rows that TRL leaves out or cuts because of ``max_length``. Raises InvalidDataset when none is left.

    ``dataset`` is the tokenized one: rows of at most max_length tokens, or packs of them with their ``seq_lengths``.
    """
    max_length = spec.options.max_length
    packed = "seq_lengths" in dataset.column_names
    column = "seq_lengths" if packed else "input_ids"
    kept = full = 0
    for rows in dataset.select_columns([column]).iter(batch_size=1000):
        lengths = [n for pack in rows[column] for n in pack] if packed else [len(ids) for ids in rows[column]]
        kept += len(lengths)
        full += sum(length >= max_length for length in lengths)
    if not kept:
        raise InvalidDataset(
            f"{param}: of every row the prompt alone has {max_length} tokens or more: raise max_length", param=param
        )
    if packed:
        events.write("message", f"{param}: {given} rows are packed into {len(dataset)} sequences")
    if kept < given:
        events.write(
            "message",
            f"{param}: {given - kept} of {given} rows are left out: the prompt alone has {max_length} tokens or more",
            level="warn",
        )
    if full:
        events.write(
            "message",
            f"{param}: {full} of {given} rows have {max_length} tokens or more: what is beyond is cut",
            level="warn",
        )
