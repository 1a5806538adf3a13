"""Packed DPO gives stock TRL's numbers: log-probabilities, losses, metrics, gradients, weights."""

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig
from trl import DPOTrainer

from bento_service.training import packed_attention
from bento_service.training.packed_dpo import PackedDPOTrainer, why_not_packed
from bento_service.training.packing import PackedCollator, PackedRow
from bento_service.training.spec import COUPLED_LOSSES, LossType
from tests.exactness.trainers import Tuning, loss_and_gradients, make_pairs, make_trainer, perturb

REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = make_pairs(24)
LOSSES = list(LossType.__args__)
# A combination, and what changes the log-probabilities or the scores before the loss.
VARIANTS = {
    "sigmoid+sft": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "ld_alpha": {"ld_alpha": 0.4},
    "weighting": {"use_weighting": True},
    "smoothing": {"loss_types": ["robust"], "loss_weights": [1.0], "label_smoothing": 0.2},
}


def close(stock: tuple, packed: tuple) -> None:
    """Loss and metrics to 1e-5, gradients to 1e-4 of the largest."""
    (loss, gradients, metrics), (packed_loss, packed_gradients, packed_metrics) = stock, packed
    assert packed_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert packed_metrics.keys() == metrics.keys()
    for name, values in metrics.items():
        assert packed_metrics[name] == pytest.approx(values, rel=1e-5, abs=2e-5), name
    assert len(packed_gradients) == len(gradients) > 0
    largest = max(gradient.abs().max() for gradient in gradients)
    for gradient, packed_gradient in zip(gradients, packed_gradients, strict=True):
        assert (gradient - packed_gradient).abs().max() <= 1e-4 * largest


@pytest.fixture(scope="module", params=[("llama", "full"), ("qwen3", "lora"), ("gpt2", "full")], ids="-".join)
def trainers(request, folders, tmp_path_factory) -> tuple[DPOTrainer, PackedDPOTrainer]:
    kind, tuning = request.param
    both = []
    for packed in (False, True):
        trainer = make_trainer(
            folders[kind], tmp_path_factory.mktemp("run"), packed=packed, pairs=PAIRS, tuning=tuning,
            use_weighting=True,  # so that the head answers with all there is
        )  # fmt: skip
        trainer.use_weighting = False
        perturb(trainer.model)
        both.append(trainer)
    return both[0], both[1]


def set_objective(trainer: DPOTrainer, **changes) -> None:
    objective = {
        "loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False,
    }  # fmt: skip
    for name, value in (objective | changes).items():
        setattr(trainer, name, value)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(trainers, loss: str) -> None:
    results = []
    for trainer in trainers:
        set_objective(trainer, loss_types=[loss], label_smoothing=0.1 if loss == "exo_pair" else 0.0)
        results.append(loss_and_gradients(trainer, list(trainer.train_dataset)[:7]))
    close(*results)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(trainers, variant: str) -> None:
    results = []
    for trainer in trainers:
        set_objective(trainer, **VARIANTS[variant])
        results.append(loss_and_gradients(trainer, list(trainer.train_dataset)[7:12]))
    close(*results)


@pytest.mark.parametrize("rows", ["one", "several"])
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_micro_batches_make_the_step_of_the_whole_batch(trainers, loss: str, rows: str) -> None:
    stock, packed = trainers
    packed.data_collator.max_tokens = 10_000 if rows == "one" else 80
    examples = list(stock.train_dataset)[:8]
    assert (len(packed.data_collator(examples)["packed"].rows) == 1) == (rows == "one")
    for trainer in trainers:
        set_objective(trainer, loss_types=[loss])
    close(*(loss_and_gradients(trainer, examples) for trainer in trainers))
    packed.data_collator.max_tokens = 150


@pytest.mark.parametrize("count", [1, 2])
def test_one_pair_and_two(trainers, count: int) -> None:
    for trainer in trainers:
        set_objective(trainer)
    examples = list(trainers[0].train_dataset)[5 : 5 + count]  # the first has an empty prompt
    close(*(loss_and_gradients(trainer, examples) for trainer in trainers))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_pairs(trainers, mode: str) -> None:
    for trainer in trainers:
        set_objective(trainer)
        trainer.data_collator.truncation_mode, trainer.data_collator.max_length = mode, 22
    examples = list(trainers[0].train_dataset)[:8]
    assert any(len(example["prompt_ids"]) + len(example["chosen_ids"]) > 22 for example in examples)
    close(*(loss_and_gradients(trainer, examples) for trainer in trainers))
    for trainer in trainers:
        trainer.data_collator.truncation_mode, trainer.data_collator.max_length = "keep_start", 48


def test_filled_rows(trainers) -> None:
    """Rows that are filled up for kernels compiled by shape."""
    for trainer in trainers:
        set_objective(trainer)
    trainers[1].data_collator.multiple_of = 64
    examples = list(trainers[0].train_dataset)[:6]
    assert all(row.tokens % 64 == 0 for row in trainers[1].data_collator(examples)["packed"].rows)
    close(*(loss_and_gradients(trainer, examples) for trainer in trainers))
    trainers[1].data_collator.multiple_of = 1


def history(trainer: DPOTrainer) -> list[dict]:
    """What was logged, but for times and TRL's count of tokens, which starts anew when a run is resumed."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second", "num_tokens"))}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("tuning", ["full", "lora", "dora"])
def test_weights_after_twenty_steps(folders: dict[str, Path], tmp_path: Path, tuning: Tuning) -> None:
    """Evaluated, accumulated, over two epochs whose last batches are ragged."""
    trainers = [
        make_trainer(
            folders["qwen3"], tmp_path / str(packed), packed=packed, pairs=PAIRS[:19], tuning=tuning,
            max_row_tokens=90, max_steps=20, gradient_accumulation_steps=2,
            eval_strategy="steps", eval_steps=10, eval_on_start=True,
        )
        for packed in (False, True)
    ]  # fmt: skip
    for trainer in trainers:
        trainer.train()
    stock, packed = map(history, trainers)
    assert len(stock) == len(packed) == 24
    for one, other in zip(stock, packed, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    for one, other in itertools.zip_longest(trainers[0].model.parameters(), trainers[1].model.parameters()):
        assert (one - other).abs().max() <= 1e-4


def test_checkpointed_activations(folders: dict[str, Path], tmp_path: Path) -> None:
    trainers = [
        make_trainer(
            folders["llama"], tmp_path, packed=packed, pairs=PAIRS, gradient_checkpointing=True, tuning="lora"
        )
        for packed in (False, True)
    ]
    for trainer in trainers:
        perturb(trainer.model)
        trainer.model.gradient_checkpointing_enable()
    close(*(loss_and_gradients(trainer, list(trainer.train_dataset)[:6]) for trainer in trainers))


def test_resumed_equals_uninterrupted(folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = {"packed": True, "pairs": PAIRS, "max_steps": 8, "max_row_tokens": 90}
    whole = make_trainer(folders["llama"], tmp_path / "whole", **arguments)
    whole.train()
    first = make_trainer(folders["llama"], tmp_path / "parts", **arguments, save_strategy="steps", save_steps=4)
    first.train()
    second = make_trainer(folders["llama"], tmp_path / "parts", **arguments)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert history(second)[:8] == history(whole)[:8]
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    saved = (tmp_path / "parts" / "checkpoint-4" / "config.json").read_text()
    assert "packed" not in saved


def test_reference_log_probabilities_of_trl_and_of_packed_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    columns = []
    for packed in (False, True):
        trainer = make_trainer(
            folders["llama"], tmp_path / str(packed), packed=packed, pairs=PAIRS, precompute_ref_log_probs=True
        )
        columns.append([trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")])
    for stock, ours in zip(*columns, strict=True):
        assert ours == pytest.approx(stock, abs=1e-4)


def test_coupled_losses_are_those_that_change_with_the_batch(trainers) -> None:
    """A loss that is not the mean of its pairs' losses must be in COUPLED_LOSSES, or its rows would be averaged."""
    stock = trainers[0]
    references = random.Random(0)
    examples = [
        example | {f"ref_{side}_logps": references.uniform(-60, -20) for side in ("chosen", "rejected")}
        for example in list(stock.train_dataset)[:6]
    ]
    stock.precompute_ref_logps = True
    coupled = set()
    for loss in LOSSES:
        set_objective(stock, loss_types=[loss], label_smoothing=0.1 if loss == "exo_pair" else 0.0)
        whole = loss_and_gradients(stock, examples)[0]
        parts = [loss_and_gradients(stock, [example])[0] for example in examples]
        if whole != pytest.approx(sum(parts) / len(parts), rel=1e-5):
            coupled.add(loss)
    stock.precompute_ref_logps = False
    assert coupled == COUPLED_LOSSES


def test_flex_attention_sees_what_the_trees_see(monkeypatch: pytest.MonkeyPatch, trainers) -> None:
    """The block mask of the CUDA path, here without compiling."""
    packed = trainers[1]
    packed.data_collator.multiple_of = 32
    (row,) = pack_rows(packed, 3)
    packed.data_collator.multiple_of = 1
    monkeypatch.setattr(packed_attention, "_compiled", lambda: flex_attention)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, row.tokens, 16, generator=generator)
    key, value = (torch.randn(1, 2, row.tokens, 16, generator=generator) for _ in range(2))
    by_tree = packed_attention._by_tree(row, query, key, value, None, 0.0)
    by_mask = packed_attention._by_block_mask(row, query, key, value, None)
    assert len(row.trees) > len(row.pairs)  # the last is filling
    torch.testing.assert_close(by_mask, by_tree, rtol=1e-5, atol=1e-5)


def pack_rows(trainer: PackedDPOTrainer, count: int) -> list[PackedRow]:
    return trainer.data_collator(list(trainer.train_dataset)[:count])["packed"].rows


TOKENS = st.integers(1, 3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(TOKENS, max_size=6), *[st.lists(TOKENS, min_size=1, max_size=6)] * 2),
        min_size=1, max_size=6,
    ),
    st.integers(1, 30), st.integers(1, 9), st.sampled_from(["keep_start", "keep_end"]), st.integers(1, 20),
)  # fmt: skip
def test_rows_hold_every_prediction_once(pairs, max_tokens, multiple_of, mode, max_length) -> None:
    """Few different tokens, so that replies often begin alike; each sequence is read back from its row."""
    collator = PackedCollator(
        pad_token_id=0, max_length=max_length, truncation_mode=mode, max_tokens=max_tokens, multiple_of=multiple_of
    )
    batch = collator(
        [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, chosen, rejected in pairs]
    )
    assert sorted(pair for row in batch["packed"].rows for pair in row.pairs) == list(range(len(pairs)))
    for row in batch["packed"].rows:
        assert row.tokens % multiple_of == 0
        assert len(row.pairs) == 1 or sum(tree.tokens for tree in row.trees[: len(row.pairs)]) <= max_tokens
        # A prediction's value: the tokens that its position may see, and the token that it predicts.
        seen = []
        for source, target in zip(row.sources.tolist(), row.targets[0].tolist(), strict=True):
            seen.append((*visible(row, source), target))
        for number, pair in enumerate(row.pairs):
            for half in range(2):
                line = half * len(pairs) + pair
                ids = batch["input_ids"][line][: int(batch["attention_mask"][line].sum())].tolist()
                wanted = {
                    (half * len(row.pairs) + number) * row.shape[1] + place - 1: (*ids[:place], ids[place])
                    for place in range(1, len(ids))
                    if batch["completion_mask"][line][place]
                }
                found = {
                    place: seen[prediction]
                    for place, prediction in zip(row.padded.tolist(), row.scored.tolist(), strict=True)
                    if place // row.shape[1] == half * len(row.pairs) + number
                }
                assert found == wanted


def visible(row: PackedRow, position: int) -> list[int]:
    """The tokens that a position of a row sees, in the order of their positions."""
    mask = packed_attention.block_mask(replace(row, block_masks={}), torch.device("cpu")).mask_mod
    zero, places = torch.tensor(0), torch.arange(row.tokens)
    sees = mask(zero, zero, torch.tensor(position), places)
    order = row.position_ids[0][sees].argsort()
    assert row.position_ids[0][sees][order].tolist() == list(range(int(sees.sum())))
    return row.input_ids[0][sees][order].tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, "16 tokens"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic position"),
    ],
    ids=["window", "recurrent", "rope"],
)
def test_what_cannot_be_packed_says_why(folders, change: dict[str, Any], reason: str) -> None:
    config = AutoConfig.from_pretrained(folders["qwen3"])
    assert why_not_packed(config, 48) is None
    for name, value in change.items():
        setattr(config, name, value)
    assert reason in str(why_not_packed(config, 48))


def test_a_window_that_no_pair_reaches_does_not_matter(folders) -> None:
    config = AutoConfig.from_pretrained(folders["qwen3"])
    config.sliding_window, config.use_sliding_window = 48, True
    config.layer_types = ["sliding_attention", "full_attention"]
    assert why_not_packed(config, 48) is None
    assert why_not_packed(config, 49) is not None


@pytest.mark.parametrize("fault", ["sees too much", "fails"])
def test_a_packed_pass_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """The check before training finds it, and the run gives TRL's numbers."""

    def leaking(row: PackedRow, query, key, value, scaling, dropout):
        if fault == "fails":
            raise RuntimeError("no such kernel")
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)

    arguments = {"pairs": PAIRS[:8], "max_steps": 2}
    stock = make_trainer(folders["llama"], tmp_path / "stock", packed=False, **arguments)
    monkeypatch.setattr(packed_attention, "_by_tree", leaking)
    trainer = make_trainer(folders["llama"], tmp_path / "packed", packed=True, falls_back=True, **arguments)
    assert {"sees too much": "differs from a stock one", "fails": "no such kernel"}[fault] in str(trainer.fallback)
    for each in (stock, trainer):
        each.train()
    assert history(trainer) == history(stock)


def test_two_processes_equal_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """DDP over gloo: half of each batch in each process, several rows each."""
    losses = {}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script = [str(REPOSITORY / "tests" / "exactness" / "ddp_run.py"), str(folders["qwen3"]), str(tmp_path)]
        done = subprocess.run(
            [*command, *script, str(8 // processes)], cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        losses[processes] = json.loads(done.stdout.splitlines()[-1])
    assert len(losses[1]) == 3
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
