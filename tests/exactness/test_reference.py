"""Reference log-probabilities are computed when that pays, and reused by the next job with the same model and data."""

from pathlib import Path
from typing import Any

import pytest

from bento_service.training.reference import KEPT, ReferenceCache, precompute_pays, reference_key
from bento_service.training.spec import TrainingSpec
from tests.exactness.trainers import Tuning, make_pairs, make_trainer

PAIRS = make_pairs(8)


def scored(
    folder: Path, output: Path, cache: Path, tuning: Tuning = "full", **settings: Any
) -> tuple[list, list[str]]:
    trainer = make_trainer(
        folder, output, packed=True, pairs=settings.pop("pairs", PAIRS), tuning=tuning, precompute_ref_log_probs=True,
        reference_cache=ReferenceCache(cache), **settings,
    )  # fmt: skip
    columns = [trainer.train_dataset[f"ref_{side}_logps"][:] for side in ("chosen", "rejected")]
    return columns, trainer.reference_reused


def test_the_next_job_reuses_them(folders: dict[str, Path], tmp_path: Path) -> None:
    """Whatever it trains: another seed, an adapter or all weights."""
    cache = tmp_path / "cache"
    first, reused = scored(folders["llama"], tmp_path / "a", cache)
    assert reused == []
    for tuning, seed in (("full", 1), ("lora", 2)):
        again, reused = scored(folders["llama"], tmp_path / f"b{seed}", cache, tuning, seed=seed)
        assert reused == ["train", "eval"]
        assert again == first


@pytest.mark.parametrize(
    "change",
    [{"max_length": 20}, {"ld_alpha": 0.5}, {"pairs": PAIRS[:7]}, {"kind": "qwen3"}],
    ids=lambda c: next(iter(c)),
)
def test_other_inputs_are_computed_anew(folders: dict[str, Path], tmp_path: Path, change: dict[str, Any]) -> None:
    kind = change.pop("kind", "llama")
    scored(folders["llama"], tmp_path / "a", tmp_path / "cache")
    _, reused = scored(folders[kind], tmp_path / "b", tmp_path / "cache", **change)
    assert "train" not in reused


def test_a_torn_file_is_computed_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, _ = scored(folders["llama"], tmp_path / "a", cache)
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    again, reused = scored(folders["llama"], tmp_path / "b", cache)
    assert reused == []
    assert again == first


def test_trained_weights_are_another_reference(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = make_trainer(folders["llama"], tmp_path, packed=True, pairs=PAIRS, max_steps=1)
    before = reference_key(trainer.model, trainer.train_dataset)
    trainer.train()
    assert reference_key(trainer.model, trainer.train_dataset) != before


def test_the_oldest_are_deleted(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    dataset = make_trainer(
        folders["llama"], tmp_path / "run", packed=True, pairs=PAIRS, precompute_ref_log_probs=True
    ).train_dataset
    bare = dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    for number in range(KEPT + 1):
        cache.keep(dataset, f"{number:03}")
    assert len(list(tmp_path.glob("*.safetensors"))) == KEPT
    assert cache.add(bare, f"{KEPT:03}") is not None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("tuning", "epochs", "max_steps", "asked", "pays"),
    [
        ("full", 1, None, None, True),
        ("full", 1, 2, None, False),  # of ten batches: most pairs would be scored for nothing
        ("lora", 1, None, None, False),
        ("lora", 2, None, None, True),
        ("lora", 1, None, True, True),
        ("full", 3, None, False, False),
    ],
)
def test_when_it_pays(tuning: str, epochs: int, max_steps: int | None, asked: bool | None, pays: bool) -> None:
    spec = TrainingSpec.model_validate(
        {
            "job_id": "ftjob-1", "method": "dpo", "model": "m", "model_path": None, "training_file": "f",
            "validation_file": None, "seed": 1, "beta": 0.1, "batch_size": 4, "n_epochs": epochs,
            "learning_rate": 1e-5, "device": "cpu",
            "options": {
                "tuning": tuning, "max_steps": max_steps, "dpo": {"precompute_ref_log_probs": asked}
            },
        }
    )  # fmt: skip
    assert precompute_pays(spec, rows=40) is pays
