"""DeepSpeed's ZeRO-3 on two CPU processes computes what one device does: by ``make test-deepspeed``.

DeepSpeed is installed in a folder of its own (.deepspeed), so that all other tests show what happens without
it. It compiles its communication in shared memory, for which it needs a C++ compiler. GPUs are another matter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer_run import REPOSITORY
from tests.two_devices import Case, train_and_compare

DEEPSPEED = REPOSITORY / ".deepspeed"
ENVIRONMENT = {
    "PYTHONPATH": f"{DEEPSPEED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    "PATH": f"{DEEPSPEED / 'bin'}{os.pathsep}{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
}


pytestmark = pytest.mark.usefixtures("signals")


def test_methods_on_two_devices_equal_one(tmp_path: Path) -> None:
    cases = [
        Case("dpo", "deepspeed", {"tuning": "full", "dpo": {"packing": False}}),
        Case("dpo", "deepspeed", {"gradient_accumulation_steps": 2, "dpo": {"packing": False}}),
        Case("supervised", "deepspeed", {"tuning": "full"}),
        Case("kto", "deepspeed"),
        Case("reward", "deepspeed"),
    ]
    train_and_compare(cases, tmp_path, continued=2, environment=ENVIRONMENT)


def test_a_spare_trainer_does_not_import_it() -> None:
    program = (
        "import sys; from bento_service.training import spare; from bento_service.training.recipes import RECIPES; "
        "spare.import_all(RECIPES.values()); print(sys.modules.get('deepspeed'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    assert found.stdout == "None\n"
