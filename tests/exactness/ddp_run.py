"""One rank of test_two_processes_equal_one: python ddp_run.py MODEL OUTPUT BATCH_SIZE_OF_A_PROCESS."""

import json
import sys
from pathlib import Path

import torch

from tests.exactness.trainers import make_pairs, make_trainer

torch.set_num_threads(1)
model, output, batch_size = sys.argv[1:]
trainer = make_trainer(
    Path(model), Path(output), packed=True, pairs=make_pairs(24), max_row_tokens=70, max_steps=3,
    per_device_train_batch_size=int(batch_size), train_sampling_strategy="sequential", ddp_backend="gloo",
)  # fmt: skip
trainer.train()
if trainer.is_world_process_zero():
    print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
