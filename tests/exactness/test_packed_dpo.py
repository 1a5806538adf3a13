"""Packed DPO gives stock TRL's numbers: log-probabilities, losses, metrics, gradients, weights."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from trl import DPOTrainer

from bento_service.training.packed_dpo import COUPLED_LOSSES, PackedDPOTrainer
from bento_service.training.spec import LossType
from tests.exactness.trainers import Tuning, loss_and_gradients, make_pairs, make_trainer, perturb

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
    settings = {"packed": True, "pairs": PAIRS, "max_steps": 8, "max_row_tokens": 90}
    whole = make_trainer(folders["llama"], tmp_path / "whole", **settings)
    whole.train()
    first = make_trainer(folders["llama"], tmp_path / "parts", **settings, save_strategy="steps", save_steps=4)
    first.train()
    second = make_trainer(folders["llama"], tmp_path / "parts", **settings)
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
