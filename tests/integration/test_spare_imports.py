"""What a spare trainer has done when it waits: everything is imported, and no GPU was asked for.

The CUDA driver reads CUDA_VISIBLE_DEVICES once, when it is first asked for anything; a spare gets its device later.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

from tests.tiny_model import make_tiny_model
from tests.trainer_run import events_of, make_run, preference_rows, write_rows

PROGRAM = """
import json, sys, threading
import torch

asked = []
for module, name in (
    (torch._C, "_cuda_getDeviceCount"), (torch._C, "_cuda_init"), (torch.cuda, "_lazy_init"),
    (torch.cuda, "is_available"), (torch.cuda, "device_count"),
):
    if hasattr(module, name):  # CPU builds lack some
        setattr(module, name, lambda *given, name=name: asked.append(name) or 0)

from bento_service.training import spare
from bento_service.training.__main__ import RECIPES

spare.import_all(RECIPES.values())
torch.cuda.is_available()  # the list is one that fills
threads = [thread.name for thread in threading.enumerate()]
print(json.dumps({"asked": asked, "modules": sorted(sys.modules), "threads": threads}))
"""

QUANTIZED = """
import sys

from bento_service.training import spare
from bento_service.training.__main__ import RECIPES, main

spare.import_all(RECIPES.values())
sys.exit(main([sys.argv[1], "--attempt", "1"]))
"""


def test_everything_is_imported_and_cuda_was_not_asked():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=250)
    after = json.loads(found.stdout)
    assert after["asked"] == ["is_available"]
    assert {
        "trl.trainer.dpo_trainer",
        "trl.trainer.sft_trainer",
        "transformers.trainer",
        "transformers.models.auto.modeling_auto",
        "peft",
        "datasets",
        "accelerate",
    } <= set(after["modules"])
    assert after["threads"] == ["MainThread"]
    assert "bitsandbytes" not in after["modules"] and find_spec("bitsandbytes") is not None


def test_a_job_that_needs_bitsandbytes_finds_it(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(4))
    run = make_run(tmp_path, make_tiny_model(tmp_path / "model"), rows, lora={"quantization": "nf4"})
    ended = subprocess.run([sys.executable, "-c", QUANTIZED, str(run.path)], timeout=250)
    assert ended.returncode == 0
    assert any(event.data.get("packing") is True for event in events_of(run, "message"))
