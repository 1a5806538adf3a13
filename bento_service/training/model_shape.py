"""The shape of a base model, read from its folder without loading it: its tensors, and its configuration's sizes."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bento_service.errors import InvalidRequest
from bento_service.training.spec import LoraOptions, TrlOptions

# The safetensors format's own limit.
_MAX_HEADER_BYTES = 100_000_000

# Types of the tensors that bitsandbytes packs weights of 4 and 8 bits into, with their scales.
_BYTES = {"U8", "I8"}

# Not adapted by LoRA's "all-linear".
_NOT_LINEAR = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder-only transformer that its activations depend on."""

    layers: int
    hidden: int
    intermediate: int  # of a mixture of experts: of all the experts that one token passes
    attention_width: int  # query heads times head size
    key_value_width: int  # key heads times head size
    vocabulary: int
    normalized_queries: bool = False  # queries and keys have norms of their own, as in Qwen3


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """``tensors`` has the name and shape of each stored tensor; it is empty when no weights are in the folder.

    Of a model that is stored quantized ``packed`` is the size of the quantized tensors in bytes; these are not among
    ``tensors``, since their shapes say nothing of the layers'.
    ``architecture`` is None when the configuration does not name the sizes of a decoder-only transformer;
    ``classes`` are transformers' names of the model with its head, ``labels`` how many a classifier's head has.
    """

    tensors: Mapping[str, tuple[int, ...]]
    architecture: Architecture | None
    packed: int = 0
    classes: tuple[str, ...] = ()
    labels: int = 2

    @classmethod
    def of(cls, folder: Path) -> "ModelShape":
        """Read from ``config.json`` and the headers of the safetensors files.

        Raises InvalidRequest when one of them is not what its name says, such as a pointer of git LFS.
        """
        (tensors, packed), config = _tensors(folder), _configuration(folder / "config.json")
        architecture = architecture_of(config)
        if architecture is not None and any(".q_norm." in name for name in tensors):
            architecture = replace(architecture, normalized_queries=True)
        classes, labels = config.get("architectures"), config.get("id2label")
        return cls(
            tensors=tensors,
            architecture=architecture,
            packed=packed,
            classes=tuple(map(str, classes)) if isinstance(classes, list) else (),
            labels=len(labels) if isinstance(labels, dict) else 2,  # transformers' default
        )

    def without_head(self) -> "ModelShape":
        """The same model with a head of one output, which hardly counts, in place of the vocabulary's."""
        return replace(self, tensors={name: size for name, size in self.tensors.items() if "lm_head" not in name})

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def layer_parameters(self) -> int:
        """Parameters of the weight matrices that are multiplied with, so not of embeddings and norms."""
        return sum(math.prod(shape) for name, shape in self.tensors.items() if _is_linear(name, shape))

    @property
    def quantized(self) -> list[tuple[int, ...]]:
        """Shapes of the matrices that bitsandbytes quantizes: transformers fuses experts, and leaves those alone."""
        return [shape for name, shape in self.tensors.items() if _is_linear(name, shape) and ".experts." not in name]

    def adapter_parameters(self, lora: LoraOptions) -> int:
        """Of a matrix of shape (out, in) LoRA trains rank * (in + out) values, and DoRA ``out`` magnitudes more."""
        targets = lora.target_modules
        adapted = [
            shape
            for name, shape in self.tensors.items()
            if len(shape) == 2 and (_is_linear(name, shape) if targets == "all-linear" else _module(name) in targets)
        ]
        magnitudes = sum(shape[0] for shape in adapted) if lora.use_dora else 0
        return lora.rank * sum(map(sum, adapted)) + magnitudes

    def trained_parameters(self, options: TrlOptions) -> int:
        return self.parameters if options.tuning == "full" else self.adapter_parameters(options.lora)


def _module(name: str) -> str:
    """Of "model.layers.0.mlp.up_proj.weight" it is "up_proj"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not any(part in name for part in _NOT_LINEAR)


def _tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes, and bytes of packed ones, from the headers of the safetensors files: 8 bytes of length, then JSON."""
    tensors: dict[str, tuple[int, ...]] = {}
    packed = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as weights:
                (length,) = struct.unpack("<Q", weights.read(8))
                header = json.loads(weights.read(min(length, _MAX_HEADER_BYTES)))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                shape = tuple(tensor["shape"])
                if tensor.get("dtype") in _BYTES:
                    packed += math.prod(shape)
                else:
                    tensors[name] = shape
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"{file} is not a safetensors file ({error}): was the model downloaded completely (git lfs pull)?",
                param="model",
            ) from error
    return tensors, packed


def _configuration(file: Path) -> dict[str, Any]:
    """Empty when there is none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise InvalidRequest(f"{file} is not a model configuration: {error}", param="model") from error
    return config


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The sizes in a configuration, under the names that Llama's descendants or GPT-2's give them."""
    text = config.get("text_config")
    values = text if isinstance(text, dict) else config

    def size(*names: str) -> int | None:
        found = [values[name] for name in names if isinstance(values.get(name), int)]
        return found[0] if found else None

    layers, hidden = size("num_hidden_layers", "n_layer"), size("hidden_size", "n_embd")
    heads, vocabulary = size("num_attention_heads", "n_head"), size("vocab_size")
    if not (layers and hidden and heads and vocabulary):
        return None
    head = size("head_dim") or hidden // heads
    experts, expert = size("num_experts_per_tok", "num_experts_per_token"), size("moe_intermediate_size")
    intermediate = size("intermediate_size", "n_inner") or 4 * hidden
    if experts:
        intermediate = experts * (expert or intermediate)
    return Architecture(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        attention_width=heads * head,
        key_value_width=(size("num_key_value_heads") or heads) * head,
        vocabulary=vocabulary,
    )
