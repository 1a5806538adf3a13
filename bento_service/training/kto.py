"""The recipe of Kahneman-Tversky optimization: from a specification to the final checkpoint, with TRL's KTOTrainer.

Read ``run`` from top to bottom; it is what a plain TRL script does, plus events, checkpoints that survive a kill, and
a stop on request. The numbers are TRL's: same data, seed and settings give the script's losses.
"""

from copy import copy
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, disable_progress_bars
from trl import KTOConfig, KTOTrainer

from bento_service.errors import InvalidDataset
from bento_service.training.arguments import shared_arguments
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


class CountingKTOTrainer(CountingTrainer, KTOTrainer):
    def further_passes(self) -> int:
        # The policy over mismatched rows, and unless scored before, the reference over both.
        mismatched = int(self.calculate_KL)
        return mismatched + (0 if self.args.precompute_ref_log_probs else 1 + mismatched)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, name: str) -> Dataset:
        # TRL mismatches the rows of a device's batch; here they are those of the batch, however many devices share it.
        args = copy(args)
        args.per_device_train_batch_size *= args.world_size
        return super()._prepare_dataset(dataset, processing_class, args, name)


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
    # A completion's reference point comes from its neighbours in the file, so batches are the same in every epoch
    # and rows are shuffled once.
    rows = data.train.shuffle(seed=spec.seed) if options.shuffle else data.train

    events.write("message", f"loading model {spec.model}")
    folder = Path(spec.model_path) if spec.model_path is not None else None
    tokenizer = load_tokenizer(
        spec.model, folder, conversational=data.conversational, trust_remote_code=spec.trust_remote_code
    )
    model = load_model(spec.model, folder, trust_remote_code=spec.trust_remote_code, quantization=quantization)

    events.write("message", f"tokenizing {len(rows)} rows")
    trainer = CountingKTOTrainer(
        model=model,
        args=KTOConfig(
            **shared_arguments(spec, run, device, precision) | {"train_sampling_strategy": "sequential"},
            beta=spec.beta,
            loss_type=options.kto.loss_type,
            desirable_weight=options.kto.desirable_weight,
            undesirable_weight=options.kto.undesirable_weight,
            precompute_ref_log_probs=options.kto.precompute_ref_log_probs,
            # TRL's disable_dropout also turns the adapter's dropout off, so it is left out when that is wanted.
            disable_dropout=options.tuning == "full" or options.lora.dropout == 0,
        ),
        train_dataset=rows,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=lora_config(options.lora, model) if options.tuning == "lora" else None,
    )
    report_lengths(trainer.train_dataset, len(rows), options.max_length, "training_file", events)
    if data.evaluation is not None:
        report_lengths(trainer.eval_dataset, len(data.evaluation), options.max_length, "validation_file", events)
    return train(trainer, spec, run, events, stop)


def report_lengths(dataset: Dataset, given: int, max_length: int, param: str, events: EventWriter) -> None:
    """Warn of rows that TRL leaves out or cuts because of ``max_length``. Raises InvalidDataset when none is left."""
    dropped, cut = given - len(dataset), 0
    for rows in dataset.select_columns(["prompt_ids", "completion_ids"]).iter(batch_size=1000):
        lengths = zip(*(map(len, column) for column in rows.values()), strict=True)
        cut += sum(prompt + completion > max_length for prompt, completion in lengths)
    if not len(dataset):
        raise InvalidDataset(
            f"{param}: the prompt of every row alone has {max_length} tokens or more: raise max_length", param=param
        )
    if dropped:
        events.write(
            "message",
            f"{param}: {dropped} of {given} rows are left out: the prompt alone has {max_length} tokens or more",
            level="warn",
        )
    if cut:
        events.write(
            "message",
            f"{param}: {cut} of {given} rows are longer than {max_length} tokens: their completions are cut",
            level="warn",
        )
