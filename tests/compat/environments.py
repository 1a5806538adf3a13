"""A virtual environment per release, made from its pins, kept between runs, with this checkout's adapter in it.

Environments lie in $TRL_COMPAT_CACHE, or $XDG_CACHE_HOME/trl-remote/compat (~/.cache). Each is named by what it was
made from, so that other pins make another one; uv links the files of packages, so that ten of them take little room.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.compat.releases import Release
from tests.stack_server import REPOSITORY

UV = Path(sys.executable).with_name("uv")


def cache() -> Path:
    if chosen := os.environ.get("TRL_COMPAT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-remote" / "compat"


def adapter_wheel(folder: Path) -> Path:
    """The adapter as a stranger installs it: built once for all releases."""
    _uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", folder, REPOSITORY / "adapter")
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(release: Release, wheel: Path) -> Path:
    """The release's python. Raises CalledProcessError with uv's words when it cannot be made."""
    made_from = hashlib.sha256(f"{sys.version_info[:3]}\n{release.pins.read_text()}".encode()).hexdigest()
    folder = cache() / f"{release.name}-{made_from[:12]}"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--python", sys.executable, folder)
        _uv("pip", "install", "--python", python, "--requirements", release.pins)
        ready.touch()
    _uv("pip", "install", "--python", python, "--no-deps", "--reinstall", wheel)
    return python


def _uv(*arguments: str | Path) -> None:
    subprocess.run([UV, *map(str, arguments), "--quiet"], check=True)
