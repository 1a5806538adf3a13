"""One rank of tests/two_devices.py: torchrun two_ranks.py RUN_DIRECTORY...

It trains one run after the other, a run that is named again from its last checkpoint but one. accelerate offers FSDP
and DeepSpeed on GPUs only: for a run with either it is told that these processes are such, which is all it asks; the
rest of both works on CPUs.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from bento_service.training import checkpoints
from bento_service.training.events import EventWriter, MutedWriter
from bento_service.training.rank import AgreedStop, Rank, first_says
from bento_service.training.recipes import RECIPES
from bento_service.training.run_directory import RunDirectory

_prepared = TrainingArguments.__post_init__


def _offer_parts(self: Any) -> None:
    if self.deepspeed:
        self.use_cpu = False
    _prepared(self)
    kind = DistributedType.MULTI_GPU if self.fsdp else DistributedType.MULTI_CPU
    if self.deepspeed:
        kind = DistributedType.DEEPSPEED
    assert self.distributed_state is not None
    PartialState._shared_state["distributed_type"] = kind


TrainingArguments.__post_init__ = _offer_parts  # type: ignore[method-assign]
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]

for number, folder in enumerate(sys.argv[1:], start=1):
    run = RunDirectory(Path(folder))
    spec = run.read_spec()
    assert Rank.of_this_process().count == spec.ranks == 2
    events = EventWriter(run.events_file) if Rank.of_this_process().is_first else MutedWriter()
    if folder in sys.argv[1:number]:
        if Rank.of_this_process().is_first:
            checkpoints.remove(run.complete_checkpoints()[-1])
        first_says(None)  # once that is done
    status = importlib.import_module(RECIPES[spec.method]).run(spec, run, events, AgreedStop())
    assert status == "succeeded"
