"""The recipe of reward models: from a specification to the final checkpoint, with TRL's RewardTrainer.

Read ``run`` from top to bottom; it is what a plain TRL script does, plus events, checkpoints that survive a kill, and
a stop on request. The numbers are TRL's: same data, seed and settings give the script's losses.
"""

from pathlib import Path
from typing import Literal

from datasets import Dataset, disable_progress_bars
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from bento_service.errors import InvalidDataset
from bento_service.training.arguments import shared_arguments
from bento_service.training.data import read_data
from bento_service.training.devices import choose_precision, find_device
from bento_service.training.events import EventWriter
from bento_service.training.lora import keep_head_wide, lora_config
from bento_service.training.models import load_model, load_tokenizer
from bento_service.training.quantization import Quantization
from bento_service.training.run_directory import RunDirectory
from bento_service.training.session import train
from bento_service.training.spec import TrainingSpec
from bento_service.training.stop import StopSwitch
from bento_service.training.throughput import CountingTrainer


class CountingRewardTrainer(CountingTrainer, RewardTrainer):
    sequences_per_row = 2  # the chosen and the rejected reply, each after the prompt
    gathers_means = True  # of accuracy and margin


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
    set_seed(spec.seed)  # the head that scores begins at random
    model = load_model(
        spec.model, folder, scores=True, trust_remote_code=spec.trust_remote_code, quantization=quantization
    )

    events.write("message", f"tokenizing {len(data.train)} pairs")
    trainer = CountingRewardTrainer(
        model=model,
        args=RewardConfig(
            **shared_arguments(spec, run, device, precision),
            center_rewards_coefficient=options.reward.center_rewards_coefficient,
            # TRL's disable_dropout also turns the adapter's dropout off, so it is left out when that is wanted.
            disable_dropout=options.tuning == "full" or options.lora.dropout == 0,
        ),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=lora_config(options.lora, model, task="SEQ_CLS") if options.tuning == "lora" else None,
    )
    if quantization is not None:
        keep_head_wide(trainer.model)
    report_lengths(trainer.train_dataset, len(data.train), options.max_length, "training_file", events)
    if data.evaluation is not None:
        report_lengths(trainer.eval_dataset, len(data.evaluation), options.max_length, "validation_file", events)
    return train(trainer, spec, run, events, stop)


def report_lengths(dataset: Dataset, given: int, max_length: int, param: str, events: EventWriter) -> None:
    """Warn of pairs that TRL leaves out because of ``max_length``. Raises InvalidDataset when none is left."""
    if not len(dataset):
        raise InvalidDataset(f"{param}: every pair has more than {max_length} tokens: raise max_length", param=param)
    if len(dataset) < given:
        events.write(
            "message",
            f"{param}: {given - len(dataset)} of {given} pairs are left out: a reply with its prompt has more than "
            f"{max_length} tokens, and only whole replies are scored",
            level="warn",
        )
