"""Settings that cannot be meant stop the start, with a line each that says what to do and holds no secret."""

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from bento_service.errors import InvalidSettings
from bento_service.settings import Settings, get_settings
from tests.bento_server import REPOSITORY, SERVICE


@pytest.fixture
def read(monkeypatch):
    """The problems that these variables make, and nothing else that the shell has set."""
    for name in [name for name in os.environ if name.upper().startswith("TRL_")]:
        monkeypatch.delenv(name)

    def problems(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        try:
            get_settings()
        except InvalidSettings as error:
            assert all("\n" not in line for line in error.problems)
            return list(error.problems)
        finally:
            get_settings.cache_clear()
        return []

    return problems


@pytest.mark.parametrize(
    ("name", "meant"),
    [("TRL_API_KEY", "TRL_API_KEYS"), ("TRL_ALLOW_ANONYMUS", "TRL_ALLOW_ANONYMOUS"), ("trl_hom", "TRL_HOME")],
)
def test_a_misspelt_setting_is_told_with_the_nearest_one(read, name, meant):
    """Else a service that was meant to be protected, say, is not."""
    (problem,) = read(**{name: "a-secret"})
    assert problem.startswith(f"{name}: ")
    assert f"did you mean {meant}?" in problem
    assert "a-secret" not in problem


def test_a_setting_like_no_other_is_told_too(read):
    (problem,) = read(TRL_QQQQQQ="1")
    assert "docs/configuration.md" in problem


def test_variables_of_others_are_no_settings(read):
    """Those of run_remote.yaml and of TRL, and what Kubernetes sets beside a Service named trl-something."""
    variables = {
        "TRL_SERVICE_URL": "http://localhost:8080",
        "TRL_SERVICE_API_KEY": "k",
        "TRL_PROVIDERS_DIR": ".",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRL_REMOTE_SERVICE_HOST": "10.0.0.1",
        "TRL_REMOTE_SERVICE_PORT_HTTP": "8080",
        "TRL_REMOTE_PORT": "tcp://10.0.0.1:8080",
        "TRL_REMOTE_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert read(**variables) == []


def test_values_out_of_range_are_told_together(read):
    problems = read(TRL_PORT="99999", TRL_DEVICE="gpu", TRL_MAX_UPLOADS="many", TRL_CORS_ORIGINS="app.example")
    assert [problem.partition(":")[0] for problem in problems] == [
        "TRL_PORT", "TRL_DEVICE", "TRL_CORS_ORIGINS", "TRL_MAX_UPLOADS",
    ]  # fmt: skip
    assert "'99999'" in problems[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRL_API_KEYS", "ci:hidden secret"),
        ("TRL_API_KEYS", '{"ci": "hidden"'),
        ("TRL_API_KEYS", '{"ci": ["hidden"]}'),
        ("TRL_API_KEYS", "a name:hidden"),
        ("TRL_API_KEYS", "ci:"),
        ("TRL_DATABASE_URL", "me:hidden@host/db"),
    ],
)
def test_a_secret_that_cannot_be_used_is_not_shown(read, name, value):
    (problem,) = read(**{name: value})
    assert problem.startswith(name)
    assert "hidden" not in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("KEY", [("key-1", "KEY")]),
        ("ci:KEY1, anna:KEY2,KEY3,", [("ci", "KEY1"), ("anna", "KEY2"), ("key-3", "KEY3")]),
        ("ci:OLD,ci:NEW", [("ci", "OLD"), ("ci", "NEW")]),
        ('{"ci": "with,comma:and-colon"}', [("ci", "with,comma:and-colon")]),
        ("ci:a:b", [("ci", "a:b")]),
        ("", []),
    ],
)
def test_keys_have_names(text, expected):
    """NAME:KEY or KEY, comma separated, or a JSON object; two keys of one name are how one takes the other's place."""
    keys = Settings(api_keys=text).api_keys
    assert [(key.name, key.secret.get_secret_value()) for key in keys] == expected
    assert all(secret not in repr(keys) for _, secret in expected)


def test_any_origin_needs_keys():
    """TRL_CORS_ORIGINS=* without keys would let any page that a browser on this host shows use the API."""
    with pytest.raises(ValidationError, match="needs TRL_API_KEYS"):
        Settings(cors_origins="*")
    assert Settings(cors_origins="*", api_keys="KEY").cors_origins == ("*",)


def test_the_start_is_refused_in_readable_lines(tmp_path):
    """By BentoML's arbiter too, once, and before it starts a worker."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRL_", "BENTOML_"))}
    ran = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", SERVICE, "--port", "1"],
        cwd=tmp_path,
        env=inherited
        | {"TRL_PROT": "1", "TRL_HOME": str(tmp_path), "BENTOML_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert "TRL_PROT: there is no such setting: did you mean TRL_PORT?" in ran.stderr.splitlines()
    assert "Traceback" not in ran.stdout + ran.stderr
