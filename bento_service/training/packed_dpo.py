"""DPO on packed batches: TRL's DPOTrainer with another forward pass.

Losses, metrics, callbacks, saving and resuming are TRL's. TRL scores a batch by one call of the model on padded
tensors [2 * pairs, S]; here that call goes through the batch's packed rows and answers in the padded form, so that
TRL's code reads the same numbers as from a stock pass. What cannot be packed exactly trains as TRL does, and says why.
"""

import contextlib
import functools
import time
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from bento_service.training import packed_attention, reply_head
from bento_service.training.packing import PackedBatch, PackedCollator, PackedRow, select_pairs
from bento_service.training.rank import of_each
from bento_service.training.reference import ReferenceCache, reference_key
from bento_service.training.spec import COUPLED_LOSSES

# The check of a packed pass against a stock one: at most this many tokens, and the largest difference of a token's
# log-probability. In half precision two exact orders of the same sums differ by some hundredths; a token that sees
# what it should not differs by more, and in float32 by far more than the bound.
CHECK_TOKENS = 512
CHECK_PAIRS = 2
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True, kw_only=True)
class PackingCheck:
    """A packed forward pass compared with TRL's on pairs of the training data."""

    pairs: int
    difference: float  # largest, of a reply token's log-probability
    seconds: float


class PackedDPOTrainer(DPOTrainer):
    """DPOTrainer that packs its batches where that is exact.

    A batch of several rows is several micro-batches: one row's activations are in memory at a time, and the
    gradient is that of the whole batch.

    Args:
        max_row_tokens: tokens of a row; a longer pair has a row of its own.
        row_multiple: rows are filled up to a multiple of so many tokens, for kernels that are compiled by shape.
        pack: False trains as TRL does.
        reference_cache: where precomputed log-probabilities of the reference are kept for other runs.
    """

    accelerator: Any
    data_collator: DataCollatorForPreference
    precompute_ref_logps: bool
    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: int
    rank_weight: float = 1.0  # by which the caller of compute_loss multiplies its answer (``shared_batches``)

    fallback: str | None  # why batches are not packed; None when they are
    reference_reused: list[str]  # the datasets, "train" or "eval", whose reference scores another run left
    check: PackingCheck | None  # None when there was nothing to check or no way to

    def __init__(
        self,
        *args: Any,
        max_row_tokens: int,
        row_multiple: int = 1,
        pack: bool = True,
        reference_cache: ReferenceCache | None = None,
        **kwargs: Any,
    ) -> None:
        self._reference_cache = reference_cache
        self.max_row_tokens = max_row_tokens
        self._row_multiple = row_multiple
        self._packed: dict[nn.Module, str] = {}  # models with packed attention, and the attention they had
        self.fallback = None if pack else "it is switched off"
        self.check = None
        self.reference_reused = []
        super().__init__(*args, **kwargs)
        self._stock_collator: DataCollatorForPreference = self.data_collator
        self.pack()

    def pack(self) -> None:
        """Take packed batches from here on, if the model can; done once."""
        if self._packed or self.fallback is not None:
            return
        self.fallback = why_not_packed(self.model.config, self.args.max_length) or self._why_not_here()
        if self.fallback is not None:
            return
        for model in filter(None, (self.model, self.ref_model)):
            base = _base_model(self.accelerator.unwrap_model(model))
            self._packed[base] = base.config._attn_implementation
            take_packed_batches(base)
        self._stock_collator = self.data_collator
        self.data_collator = PackedCollator(
            **vars(self._stock_collator), max_tokens=self.max_row_tokens, multiple_of=self._row_multiple
        )
        self._set_attention(packed=True)
        whole_model = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)  # before training
        if whole_model and len(self.train_dataset):
            self._check()

    def _why_not_here(self) -> str | None:
        if self.is_deepspeed_enabled:
            return "DeepSpeed has the model's parts"
        if self.aux_loss_enabled:
            return "the model's load-balancing loss counts every token of the padded batch"
        if self._is_vision_dataset:
            return "the data has images"
        if getattr(self.accelerator.unwrap_model(self.model), "is_loaded_in_8bit", False):
            return "layers of 8 bits compute a token by what else is in the batch"
        for model in filter(None, (self.model, self.ref_model)):
            if not _base_model(self.accelerator.unwrap_model(model))._can_set_attn_implementation():
                return "the model brings its own attention"
        return None

    def _set_attention(self, *, packed: bool) -> None:
        for model, stock in self._packed.items():
            model.set_attn_implementation(packed_attention.NAME if packed else stock)

    def _check(self) -> None:
        """Compare a packed pass with a stock one on some of the data; unless they agree, train as TRL does."""
        began = time.monotonic()
        examples = _few_tokens(self.train_dataset.select(range(min(64, len(self.train_dataset)))))
        difference, problem = float("nan"), None
        try:
            packed = self._log_probs(self.data_collator(examples))
            self._set_attention(packed=False)
            stock = self._log_probs(self._stock_collator(examples))
            self._set_attention(packed=True)
            difference = (packed.float() - stock.float()).abs().max().item()
            if not difference <= CHECK_TOLERANCE[self._compute_dtype]:
                problem = f"a packed pass differs from a stock one by {difference:.2g} in a log-probability"
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            # Whatever the model's code does with packed rows, a stock run is right; the reason tells the error.
            problem = f"a packed pass failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        self.check = PackingCheck(pairs=len(examples), difference=difference, seconds=time.monotonic() - began)
        if sum(of_each(problem is not None)):  # all ranks or none
            problem = problem or "a packed pass differs from a stock one on another rank"
            self._set_attention(packed=False)
            self.data_collator = self._stock_collator
            self.fallback = problem

    def _log_probs(self, batch: dict[str, Any]) -> Tensor:
        batch = send_to_device(batch, self.accelerator.device)
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        training = self.model.training
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                self.accelerator.autocast(),
            ):
                return self.model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        finally:
            self.model.train(training)

    @property
    def _compute_dtype(self) -> torch.dtype:
        """As exact as matrix products are; TF32's factors have as many bits as those of float16."""
        full = torch.float16 if self.args.tf32 else torch.float32
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, full)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.pack()  # TRL computes these at the end of its own __init__
        if not len(dataset):  # every pair was left out, which the recipe tells
            return dataset
        if self._reference_cache is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        key = reference_key(
            self.ref_model or self.model,
            dataset,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            ld_alpha=self.ld_alpha,
            precision=self.accelerator.mixed_precision,
            tf32=self.args.tf32,
        )
        known = self._reference_cache.add(dataset, key)
        # All processes or none: another job may store it between the looks of two of them.
        if all(of_each(known is not None)):
            self.reference_reused.append(name)
            return known
        scored = super()._precompute_ref_logps(dataset, name, batch_size)
        if self.accelerator.is_main_process:
            self._reference_cache.keep(scored, key)
        return scored

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        packed: PackedBatch | None = inputs.get("packed")
        if packed is None:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.is_fsdp_enabled:
            # In each pass the ranks gather the model's parts from each other.
            packed = replace(packed, repeats=max(of_each(len(packed.rows))) - len(packed.rows))
            inputs = inputs | {"packed": packed}
        if not self.precompute_ref_logps:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        with self._reference_given():
            if len(packed.passes) == 1 or not torch.is_grad_enabled():
                return super()._compute_loss(model, inputs, return_outputs)
            if COUPLED_LOSSES & set(self.loss_types):
                return self._in_two_passes(model, inputs)
            return self._row_by_row(model, inputs)

    @contextlib.contextmanager
    def _reference_given(self) -> Iterator[None]:
        """TRL's loss takes the reference's log-probabilities from the batch."""
        before = self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    def _row_by_row(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The batch's loss. The gradients of all rows but the last are added up here, the last is the caller's."""
        pairs = inputs["input_ids"].shape[0] // 2
        loss, outputs = torch.zeros((), device=self.accelerator.device), []
        for (row, counts), last in _with_last(inputs["packed"].passes):
            part = select_pairs(inputs, row)
            with contextlib.nullcontext() if last else self._unsynced(model):
                output = _score(model, part)
                with self._metrics_discarded():
                    share = super()._compute_loss(_Answer(output), part, False) * (counts * len(row.pairs) / pairs)
                if counts:
                    outputs.append(_detached(output))
                if not last:
                    self.accelerator.backward(share * self.rank_weight / self.current_gradient_accumulation_steps)
                    share = share.detach()
                loss = loss + share
                del output
        with torch.no_grad():  # for the metrics, over the whole batch
            super()._compute_loss(_Answer(_join(outputs, inputs["packed"])), inputs, False)
        return loss

    def _in_two_passes(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """As ``_row_by_row`` for losses over the whole batch: their gradient by log-probability comes first."""
        passes = inputs["packed"].passes
        with torch.no_grad():
            answers = [(_score(model, select_pairs(inputs, row)), counts) for row, counts in passes]
            scored = _join([answer for answer, counts in answers if counts], inputs["packed"])
        scored.log_probs.requires_grad_()
        loss = super()._compute_loss(_Answer(scored), inputs, False)
        (gradient,) = torch.autograd.grad(loss, scored.log_probs)
        loss = loss.detach()
        for (row, counts), last in _with_last(passes):
            with contextlib.nullcontext() if last else self._unsynced(model):
                log_probs = _score(model, select_pairs(inputs, row)).log_probs
                product = (log_probs * gradient[_both(row, gradient)]).sum() * counts
                if not last:
                    self.accelerator.backward(product * self.rank_weight / self.current_gradient_accumulation_steps)
        return loss + product - product.detach()

    def _unsynced(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Gradients stay on this rank; with FSDP they would be the whole model's, so there they are sent each time."""
        return contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    @contextlib.contextmanager
    def _metrics_discarded(self) -> Iterator[None]:
        """TRL's loss of a part of the batch: no metrics, and no gathering of them, since processes have other rows."""
        metrics, tokens, accelerator = self._metrics, self._total_train_tokens, self.accelerator
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.accelerator = _Alone(accelerator)
        try:
            yield
        finally:
            self._metrics, self._total_train_tokens, self.accelerator = metrics, tokens, accelerator


def why_not_packed(config: PreTrainedConfig, max_length: int | None) -> str | None:
    """Why a model's sequences of up to ``max_length`` tokens cannot be packed; None when nothing says so."""
    text = config.get_text_config()
    if text is not config:
        return "the model takes more than text"
    if getattr(config, "is_encoder_decoder", False):
        return "the model has an encoder"
    reach = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds = {"sliding_attention"}
    for kind in sorted(kinds - {"full_attention"}):
        window = getattr(config, reach.get(kind, ""), None)
        if window is None:
            return f"the model has {kind} layers"
        if max_length is None or max_length > window:
            return f"the model's {kind} reaches {window} tokens, and pairs may have {max_length or 'any number'}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"the model's {rope} position embedding depends on the longest sequence of the padded batch"
    return None


def take_packed_batches(model: PreTrainedModel) -> None:
    """Let a model with TRL's fused head take ``packed``, a PackedBatch, and answer in the padded form.

    The head scores the positions that predict a token of a reply, and no others.
    """
    stock_forward = model.forward
    model.base_model.register_forward_hook(_keep_sources, with_kwargs=True)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, packed: PackedBatch | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return stock_forward(*args, **kwargs)
        for padded in ("input_ids", "attention_mask", "labels"):
            kwargs.pop(padded, None)
        outputs = []
        for row, counts in packed.passes:
            inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "packed_row": row}
            if reply_head.applies_to(self):
                hidden = self.base_model(**inputs, use_cache=False).last_hidden_state
                output = reply_head.score(self, hidden, row.targets)
            else:
                output = stock_forward(**inputs, shift_labels=row.targets, **kwargs)
            if counts:
                outputs.append(FusedCausalLMOutput(**{name: row.unpack(output.get(name)) for name in _PER_TOKEN}))
        return outputs[0] if len(outputs) == 1 else _join(outputs, packed)

    model.forward = types.MethodType(forward, model)


def _keep_sources(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    row: PackedRow | None = kwargs.get("packed_row")
    if row is not None:
        output.last_hidden_state = output.last_hidden_state[:, row.sources]
    return output


class _Answer:
    """Stands for the model in TRL's loss: its output is there already."""

    def __init__(self, output: FusedCausalLMOutput) -> None:
        self._output = output

    def __call__(self, **kwargs: Any) -> FusedCausalLMOutput:
        return self._output


class _Alone:
    """An Accelerator's device, in a process that gathers from itself only."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.device = accelerator.device

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def _score(model: nn.Module, inputs: dict[str, Any]) -> FusedCausalLMOutput:
    return model(packed=inputs["packed"], input_ids=inputs["input_ids"], use_cache=False, fused_lm_head=True)


def _join(outputs: Sequence[FusedCausalLMOutput], packed: PackedBatch) -> FusedCausalLMOutput:
    """The rows' outputs as one of the whole batch, without gradient."""
    pairs = sum(len(row.pairs) for row in packed.rows)
    fields = {}
    for name in _PER_TOKEN:
        if outputs[0].get(name) is not None:
            whole = outputs[0][name].new_zeros(2 * pairs, packed.rows[0].shape[1])
            for row, output in zip(packed.rows, outputs, strict=True):
                whole[_both(row, whole)] = output[name].detach()
            fields[name] = whole
    return FusedCausalLMOutput(**fields)


def _both(row: PackedRow, whole: Tensor) -> Tensor:
    """Indices of the row's chosen and rejected sequences in a batch [2 * pairs, ...]."""
    pairs = torch.tensor(row.pairs, device=whole.device)
    return torch.cat([pairs, pairs + whole.shape[0] // 2])


def _detached(output: FusedCausalLMOutput) -> FusedCausalLMOutput:
    return FusedCausalLMOutput(**{name: output[name].detach() for name in _PER_TOKEN if output.get(name) is not None})


def _base_model(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _few_tokens(dataset: Any) -> list[dict[str, Any]]:
    """Some of the shortest pairs, at least one."""

    def tokens(example: dict[str, Any]) -> int:
        return sum(len(example[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids"))

    taken: list[dict[str, Any]] = []
    room = CHECK_TOKENS
    for example in sorted(dataset, key=tokens)[:CHECK_PAIRS]:
        room -= tokens(example)
        if taken and room < 0:
            break
        taken.append(example)
    return taken


def _with_last[T](items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    for number, item in enumerate(items, start=1):
        yield item, number == len(items)
