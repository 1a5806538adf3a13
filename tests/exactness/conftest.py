from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_model(root / kind, kind=kind) for kind in ("llama", "qwen3", "gpt2")}
