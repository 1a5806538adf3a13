"""How much memory a run takes, by arithmetic on its model's shape and its batches. Nothing is loaded or measured here.

What is counted, in bytes. Trained and frozen weights are float32 (TRL's recipe, ``models.load_model``):

    weights      4 a parameter, 4 a parameter of the adapter, and under bf16 or fp16 2 a parameter of the layers:
                 autocast's copies of weights live from the forward pass to the backward pass. Quantized layers take
                 0.516 (nf4) or 1 (int8) a parameter and are not copied; the largest of them is widened for its product
    reference    4 a parameter where a second model is kept: full fine-tuning without precomputed reference scores
    gradients    4 a trained parameter
    optimizer    8 a trained parameter for Adam's two moments, 0 for SGD without momentum. Gradients, moments and
                 weights of an adapter of a quantized model take half: TRL keeps them in bf16
    activations  what one micro-batch's forward pass keeps for its backward pass, and the vocabulary's logits
    several      with ddp another 4 a trained parameter, the buckets in which gradients are sent; with fsdp or
    devices      deepspeed weights, reference, gradients and optimizer are divided among the devices, and each has the
                 whole weights of two layers, or of all that is no layer, while these are computed
    overhead     the process: interpreter, libraries, and the CUDA context

The bytes that autograd keeps of a layer for one token were read off PyTorch's saved-tensor hooks with transformers'
Llama and Qwen3 (sdpa attention), by varying one size at a time; ``benchmarks/memory.py`` compares the sum with the
peak of real runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bento_service.training.model_shape import Architecture, ModelShape
from bento_service.training.spec import QuantizationName, TrainingSpec

ComputePrecision = Literal["bf16", "fp16", "fp32"]
DeviceKind = Literal["cuda", "cpu", "mps"]

_WEIGHT = 4
_GRADIENT = 4
# NF4: half a byte, a byte for each 64 parameters as their scale, and for 256 of those scales a scale of 4 bytes.
_QUANTIZED: dict[QuantizationName | None, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_IN_PARTS = ("fsdp", "deepspeed")  # distributions in which no device has the whole model
MOMENTS = {"adamw": 8, "adam": 8, "sgd": 0}  # bytes a trained parameter

# trl.kernels.chunked_logprob: logits are made in tiles of so many tokens and vocabulary entries at most.
_TILE_TOKENS = 4096
_TILE_VOCABULARY = 32768
# The same of bento_service.training.reply_head (which is not imported here: it imports torch).
_PACKED_TILE = 1 << 23
# float32 tensors of a tile's size that its backward pass holds at once. Where Triton works (CUDA) it is done in place.
_TILE_COPIES = {"cuda": 1, "cpu": 9, "mps": 9}

# Of activations, what the process holds for each byte that is alive. On Linux, glibc's malloc keeps freed blocks
# between others: measured with benchmarks/memory.py, 1.4 to 1.5. PyTorch's CUDA allocator was not measured.
_HELD = {"cuda": 1.1, "cpu": 1.4, "mps": 1.4}

# A process that has imported torch, transformers, trl, peft and datasets and trained a model of no size (measured on
# Linux with CPU). For CUDA its context and libraries' workspaces come to about 1 GB: a guess, not measured.
OVERHEAD = {"cuda": 1_000_000_000, "cpu": 750_000_000, "mps": 1_000_000_000}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward pass, as large as it gets in the run.

    ``tokens`` go through the layers, padding included; ``scored`` of them through the vocabulary's head; ``mask`` is
    the number of values of the attention mask (0: none is made).
    """

    tokens: int
    scored: int
    mask: int = 0
    packed: bool = False  # scored by ``reply_head`` on a CPU
    partial: bool = False  # one of several of a batch, whose gradients are added up


def padded_batch(longest: int, *, sequences: int, size: int, generates: bool = True) -> MicroBatch:
    """The largest batch of a trainer that pads: ``size`` rows of ``sequences`` each, all as long as the longest.

    A model that only scores has no vocabulary to go through (``generates``).
    """
    tokens = sequences * size * longest
    return MicroBatch(tokens=tokens, scored=tokens if generates else 0, mask=tokens * longest)


def packed_batch(examples: Sequence[tuple[int, int]], max_tokens: int) -> MicroBatch:
    """The largest row of packed DPO: whole pairs one after the other, each with its prompt once.

    ``examples`` are the tokens of a batch's pairs, and those of them that are scored
    (``TokenStatistics.largest_examples``); a row has ``max_tokens`` at most, unless one pair alone has more.
    """
    tokens, scored = (sum(column) for column in zip(*examples, strict=True))
    most = max(max_tokens, max(pair for pair, _ in examples))
    if tokens <= most:
        return MicroBatch(tokens=tokens, scored=scored, packed=True)
    return MicroBatch(tokens=most, scored=min(scored, most), packed=True, partial=True)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device. ``activations`` is None when the model's architecture or its tokens are not known."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int | None
    overhead: int
    accumulated: bool  # gradients of earlier micro-batches are there while the next one runs

    @property
    def certain(self) -> int:
        """What is there at the end of a backward pass, whatever the data: no run needs less."""
        return self.weights + self.reference + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak. Gradients grow as activations are freed: the two add up only where gradients are accumulated."""
        activations = self.activations or 0
        if self.accumulated:
            return self.certain + activations + self.overhead
        return self.certain + max(0, activations - self.gradients) + self.overhead


def estimate(
    spec: TrainingSpec, shape: ModelShape, precision: ComputePrecision, device: DeviceKind, batch: MicroBatch | None
) -> MemoryEstimate:
    """The memory of one process that trains as specified; ``batch`` is None when the data has not been looked at."""
    options = spec.options
    if spec.method == "reward":
        shape = shape.without_head()
    trained = shape.trained_parameters(options)
    adapter = trained if options.tuning == "lora" else 0
    keeps_reference = options.tuning == "full" and (
        # Unless the user asks for it, DPO keeps no second model: its scores are computed before training, which a
        # model in parts does not allow.
        (spec.method == "dpo" and (options.dpo.precompute_ref_log_probs is False or spec.distribution in _IN_PARTS))
        or (spec.method == "kto" and not options.kto.precompute_ref_log_probs)
    )
    activations = None
    if batch is not None and shape.architecture is not None:
        activations = activation_bytes(spec, shape.architecture, precision, device, batch)
    quantization = options.lora.quantization if options.tuning == "lora" else None
    narrow = [math.prod(matrix) for matrix in shape.quantized] if quantization is not None else []
    size = 4 if precision == "fp32" else 2
    casts = 0 if precision == "fp32" else 2 * (shape.layer_parameters - sum(narrow))
    widened = size * max(narrow, default=0)
    halves = 2 if quantization is not None else 1
    weights = _WEIGHT * (shape.parameters - sum(narrow)) + round(_QUANTIZED.get(quantization, 0) * sum(narrow))
    weights += _WEIGHT * adapter // halves + shape.packed
    sharded = spec.distribution in _IN_PARTS
    parts = spec.ranks if sharded else 1
    # ``layer_parameters`` are those of all layers; they are copied one layer at a time where they are gathered.
    layers = shape.architecture.layers if shape.architecture is not None else 1
    gathered = size * max(2 * shape.layer_parameters // layers, shape.parameters - shape.layer_parameters)
    buckets = _GRADIENT * trained // halves if spec.distribution == "ddp" else 0
    return MemoryEstimate(
        weights=weights // parts + (gathered if sharded else casts) + widened,
        reference=_WEIGHT * shape.parameters // parts if keeps_reference else 0,
        gradients=_GRADIENT * trained // halves // parts + buckets,
        optimizer=MOMENTS[options.optimizer.name] * trained // halves // parts,
        activations=activations,
        overhead=OVERHEAD[device],
        accumulated=options.gradient_accumulation_steps > 1 or (batch is not None and batch.partial),
    )


def activation_bytes(
    spec: TrainingSpec, model: Architecture, precision: ComputePrecision, device: DeviceKind, batch: MicroBatch
) -> int:
    """What a forward pass keeps for its backward pass, with a layer's working set and the logits."""
    options = spec.options
    layer = _layer_bytes(model, precision, lora_rank=options.lora.rank if options.tuning == "lora" else None)
    size = 4 if precision == "fp32" else 2
    masked = 0
    if batch.mask:
        # A mask is made a matrix of floats in every layer, and keys and values are repeated for every query head.
        masked = size * batch.mask + 2 * size * (model.attention_width - model.key_value_width) * batch.tokens
    kept = layer * batch.tokens + masked
    if options.gradient_checkpointing:
        layers = model.layers * 4 * model.hidden * batch.tokens + kept
    else:
        layers = model.layers * kept
    # The largest step of a layer's backward pass: gradients of the MLP's three inner tensors.
    working = 3 * size * model.intermediate * batch.tokens
    # Embeddings, the last norm (three float32 tensors), the head's input and its gradient, before and after reshaping.
    ends = 8 * 4 * model.hidden * batch.tokens
    tile = min(batch.scored, _TILE_TOKENS) * min(model.vocabulary, _TILE_VOCABULARY)
    if batch.packed:
        tile = min(tile, max(_PACKED_TILE, model.vocabulary))
    head = tile * (4 * _TILE_COPIES[device] if device != "cuda" else size)
    head_gradient = _WEIGHT * model.vocabulary * model.hidden if options.tuning == "full" and batch.scored else 0
    return round(_HELD[device] * (layers + ends + max(working, head + head_gradient)))


def _layer_bytes(model: Architecture, precision: ComputePrecision, lora_rank: int | None) -> int:
    """Bytes that a layer keeps of one token, without a mask. ``lora_rank`` is None in full fine-tuning.

    The MLP keeps four inner tensors (gate, its activation, up, their product). A norm keeps its input and, when its
    weight is trained, the normalized input, in float32; its output is kept once in float32, or under autocast in bf16
    by each linear layer that reads it (three in attention, two in the MLP). Attention keeps queries, keys, values and
    its output; through LoRA under autocast, the output's cast too.
    """
    size = 4 if precision == "fp32" else 2
    trained_norms = 2 * 4 if lora_rank is None else 0
    norms = 2 * 4 + trained_norms + (2 * 4 if precision == "fp32" else 5 * 2)
    mlp = 4 * size
    attention = 2 * size + (2 if lora_rank is not None and precision != "fp32" else 0)
    kept = norms * model.hidden + mlp * model.intermediate + attention * model.attention_width
    kept += 2 * size * model.key_value_width
    if model.normalized_queries:
        norm = 6 if precision != "fp32" else 4 + trained_norms // 2
        kept += norm * (model.attention_width + model.key_value_width)
    if lora_rank is not None:
        kept += 7 * lora_rank * size  # each of seven linear layers keeps what lies between its adapter's two matrices
    return kept
