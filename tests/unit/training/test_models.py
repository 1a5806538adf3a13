"""Finding base models by name."""

import os
from pathlib import Path

import pytest

from bento_service.errors import UnknownModel
from bento_service.training.models import find_model, local_models


def make_model(models_path: Path, name: str) -> Path:
    folder = models_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_local_model_is_found_by_its_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "org/tiny-0.1B")
    assert find_model("org/tiny-0.1B", tmp_path) == folder.resolve()


def test_a_model_that_is_not_local_is_left_to_the_hub(tmp_path: Path) -> None:
    assert find_model("org/elsewhere", tmp_path) is None
    assert find_model("gpt2", tmp_path / "missing") is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc",
        "../secret",
        "org/../../etc",
        "org/..",
        "./org",
        "~/model",
        "a/b/c",
        "org\\model",
        "org/mo del",
        "org/",
        "org/model\n",
        "\x00",
        "a..b",
    ],
)
def test_a_name_that_could_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownModel, match="is not a model name") as caught:
        find_model(name, tmp_path)
    assert caught.value.param == "model"


def test_a_link_out_of_the_models_directory_is_refused(tmp_path: Path) -> None:
    outside = make_model(tmp_path / "outside", "model")
    models_path = tmp_path / "models"
    (models_path / "org").mkdir(parents=True)
    (models_path / "org" / "model").symlink_to(outside)
    with pytest.raises(UnknownModel, match="leads out"):
        find_model("org/model", models_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "org" / "half").mkdir(parents=True)
    with pytest.raises(UnknownModel, match=r"without config\.json"):
        find_model("org/half", tmp_path)


def test_local_models_are_listed_by_name(tmp_path: Path) -> None:
    make_model(tmp_path, "org/b")
    make_model(tmp_path, "org/a")
    make_model(tmp_path, "single")
    (tmp_path / "org" / "half").mkdir()
    assert local_models(tmp_path) == ["org/a", "org/b", "single"]
    assert local_models(tmp_path / "missing") == []


def test_a_model_that_this_process_may_not_read_is_named_with_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    # As root, who runs these tests in containers, every file can be read.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model.safetensors")
    with pytest.raises(UnknownModel, match=r"may not read model\.safetensors: chmod"):
        find_model("org/model", tmp_path)
    assert local_models(tmp_path) == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UnknownModel, match="may not read its folder: chmod"):
        find_model("org/model", tmp_path)
