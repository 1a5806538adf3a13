"""The DPO recipe: from a specification to the final checkpoint, with TRL's DPOTrainer.

Read ``run`` from top to bottom; it is what a plain TRL script does (``examples/dpo_script.py``), plus events,
checkpoints that survive a kill, and a stop on request. The numbers are TRL's: same data, seed and settings give
the script's losses.
"""

import json
from pathlib import Path
from typing import Literal

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from bento_service.errors import InvalidDataset, InvalidRequest
from bento_service.training.callbacks import AlreadyTrained, EventsCallback, ScheduleCallback
from bento_service.training.devices import choose_precision, find_device
from bento_service.training.events import EventWriter
from bento_service.training.models import load_model, load_tokenizer
from bento_service.training.preferences import load_rows, require_valid
from bento_service.training.run_directory import RunDirectory
from bento_service.training.schedule import Schedule
from bento_service.training.spec import LoraOptions, TrainingSpec
from bento_service.training.stop import StopRequested, StopSwitch

# TRL's names of the optimizers. adamw is TRL's own default; adam is AdamW without weight decay, which is Adam.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adam": "adamw_torch_fused", "sgd": "sgd"}


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

    events.write("message", f"reading the data; training on {device.kind} in {precision}")
    train_dataset, conversational = read_pairs(Path(spec.training_file), "training_file", run.cache)
    eval_dataset = None
    if spec.validation_file is not None:
        eval_dataset, eval_conversational = read_pairs(Path(spec.validation_file), "validation_file", run.cache)
        conversational = conversational or eval_conversational
    elif options.evaluation.split > 0:
        train_dataset, eval_dataset = hold_out(train_dataset, options.evaluation.split, spec.seed)
    eval_batch_size = options.evaluation.batch_size or spec.batch_size
    if eval_dataset is not None and options.evaluation.max_steps is not None:
        eval_dataset = eval_dataset.select(
            range(min(len(eval_dataset), options.evaluation.max_steps * eval_batch_size))
        )

    events.write("message", f"loading model {spec.model}")
    folder = Path(spec.model_path) if spec.model_path is not None else None
    tokenizer = load_tokenizer(spec.model, folder, conversational=conversational)
    model = load_model(spec.model, folder)

    events.write("message", f"tokenizing {len(train_dataset)} pairs")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(run.checkpoints),
            seed=spec.seed,
            use_cpu=device.kind == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            # The objective
            beta=spec.beta,
            loss_type=list(options.dpo.loss_type),
            loss_weights=options.dpo.loss_weights,
            label_smoothing=options.dpo.label_smoothing,
            f_divergence_type=options.dpo.f_divergence_type,
            f_alpha_divergence_coef=options.dpo.f_alpha_divergence_coef,
            ld_alpha=options.dpo.ld_alpha,
            discopop_tau=options.dpo.discopop_tau,
            use_weighting=options.dpo.use_weighting,
            precompute_ref_log_probs=options.dpo.precompute_ref_log_probs,
            # TRL's disable_dropout also turns the adapter's dropout off, so it is left out when that is wanted.
            disable_dropout=options.tuning == "full" or options.lora.dropout == 0,
            # The data
            max_length=options.max_length,
            train_sampling_strategy="random" if options.shuffle else "sequential",
            per_device_train_batch_size=spec.batch_size,
            per_device_eval_batch_size=eval_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            dataloader_pin_memory=device.kind == "cuda",
            # The optimizer
            optim=OPTIMIZERS[options.optimizer.name],
            learning_rate=spec.learning_rate,
            weight_decay=options.optimizer.decay,
            max_grad_norm=options.optimizer.max_grad_norm,
            lr_scheduler_type=options.scheduler.name,
            warmup_steps=options.scheduler.warmup_ratio
            if options.scheduler.warmup_steps is None
            else options.scheduler.warmup_steps,
            # Memory
            gradient_checkpointing=options.gradient_checkpointing,
            activation_offloading=options.activation_offloading,
            # Evaluating and saving are asked for by ScheduleCallback; old checkpoints are deleted by EventsCallback,
            # because the Trainer would delete one before the next is known to be whole.
            eval_strategy="no",
            save_strategy="no",
            logging_steps=options.logging.steps,
            logging_nan_inf_filter=False,  # a loss that is not a number must be seen
            include_num_input_tokens_seen="non_padding",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(options.lora, model) if options.tuning == "lora" else None,
    )
    report_lengths(trainer.train_dataset, len(train_dataset), options.max_length, "training_file", events)
    if eval_dataset is not None:
        report_lengths(trainer.eval_dataset, len(eval_dataset), options.max_length, "validation_file", events)

    schedule = Schedule.of(spec, pairs=len(trainer.train_dataset), evaluated=eval_dataset is not None)
    trainer.args.max_steps = schedule.total_steps
    reporter = EventsCallback(events, run, schedule)
    trainer.add_callback(ScheduleCallback(schedule, stop))
    trainer.add_callback(reporter)

    complete = run.complete_checkpoints()
    checkpoint = complete[-1] if complete else None
    if checkpoint is None:
        trainer.args.eval_on_start = schedule.evaluates_before
    else:
        events.write("message", f"continuing from {checkpoint.name}")
        trainer.args.eval_on_start = misses_evaluation(checkpoint, schedule)

    stop.defer()
    if stop.requested:
        return "stopped"
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except AlreadyTrained:
        return "succeeded"
    except StopRequested:
        # Between two steps, or out of an evaluation: what the last step left may not be saved yet.
        step = trainer.state.global_step
        if step > 0 and not any(path.name == f"checkpoint-{step}" for path in run.complete_checkpoints()):
            trainer._save_checkpoint(trainer.model, trial=None)
            reporter.on_save(trainer.args, trainer.state, trainer.control)
        return "stopped"
    return "succeeded" if trainer.state.global_step >= schedule.total_steps else "stopped"


def read_pairs(file: Path, param: str, cache: Path) -> tuple[Dataset, bool]:
    """The pairs of a data file, kept on disk under ``cache``, and whether they are conversational.

    Raises InvalidDataset when a row cannot be trained on.
    """
    require_valid(file, param, max_bytes=None)  # its size was checked when the job was submitted
    dataset = Dataset.from_generator(load_rows, gen_kwargs={"path": file}, cache_dir=str(cache))
    return dataset, isinstance(dataset[0]["chosen"], list)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a fraction of the pairs, at least one, for evaluation; the split depends on the seed only."""
    if len(dataset) < 2:
        raise InvalidDataset(
            "evaluation.split needs at least 2 pairs, training_file has 1: add pairs or set split to 0",
            param="training_file",
        )
    held_out = min(max(1, round(fraction * len(dataset))), len(dataset) - 1)
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def lora_config(lora: LoraOptions, model: PreTrainedModel) -> LoraConfig:
    """The adapter. Raises InvalidRequest for target modules that the model lacks or that DPO cannot train."""
    if lora.target_modules != "all-linear":
        head = model.get_output_embeddings()
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        if unknown := sorted(set(lora.target_modules) - linear):
            raise InvalidRequest(
                f"lora.target_modules {unknown} cannot be adapted: name some of {sorted(linear)} "
                "(TRL's DPO does not train an adapter of the output head)",
                param="lora.target_modules",
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
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
            f"{param}: {cut} of {given} pairs are longer than {max_length} tokens: their replies are cut",
            level="warn",
        )


def misses_evaluation(checkpoint: Path, schedule: Schedule) -> bool:
    """Whether a stop left out the evaluation that was due after the checkpoint's step."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    step = state["global_step"]
    done = any("eval_loss" in entry and entry["step"] == step for entry in state["log_history"])
    return schedule.evaluates_after(step) and not done
