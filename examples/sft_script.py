"""Supervised fine-tuning with TRL alone, nothing of this project: what one of its jobs does, as you would write it.

    python examples/sft_script.py MODEL_FOLDER examples/chat.jsonl --learning-rate 2e-4

prints one JSON object per optimizer step, with TRL's names. A job with the same data, seed and settings reports the
same losses; tests/integration/test_supervised_run.py holds it to that. The defaults are those of a job.
"""

import argparse
import json
import tempfile
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer


class PrintLogs(TrainerCallback):
    """Prints what the trainer logs, one JSON object a line."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        print(json.dumps({"step": state.global_step, **(logs or {})}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of the base model")
    parser.add_argument("train_file", help="JSON lines with messages, or with prompt and completion")
    parser.add_argument("--eval-file", help="rows to evaluate on before training and after each epoch")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=32)
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        data = load_dataset("json", data_files={"train": options.train_file}, cache_dir=scratch)
        held_out = None
        if options.eval_file:
            held_out = load_dataset("json", data_files={"eval": options.eval_file}, cache_dir=scratch)["eval"]
        trainer = SFTTrainer(
            model=options.model,
            args=SFTConfig(
                output_dir=scratch,
                seed=options.seed,
                use_cpu=True,
                bf16=False,
                # Of conversations the assistant's turns are learned; the chat template must mark them.
                assistant_only_loss="messages" in data["train"].column_names,
                max_length=2048,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                gradient_accumulation_steps=options.gradient_accumulation_steps,
                gradient_checkpointing=False,
                num_train_epochs=options.epochs,
                learning_rate=options.learning_rate,
                weight_decay=0.01,
                max_grad_norm=1.0,
                lr_scheduler_type="linear",
                warmup_steps=0.1,
                eval_strategy="epoch" if held_out is not None else "no",
                eval_on_start=held_out is not None,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data["train"],
            eval_dataset=held_out,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=options.lora_rank,
                lora_alpha=options.lora_alpha,
                lora_dropout=options.lora_dropout,
                target_modules="all-linear",
            )
            if options.tuning == "lora"
            else None,
            callbacks=[PrintLogs()],
        )
        # The Trainer's own printing of the same logs, in another format.
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
