"""The programs that images are made and run with."""

import os
import shutil
import subprocess
from pathlib import Path

# The image is 7 GB, and is written twice while it is made.
DISK_BYTES = 25 * 10**9


def missing(folder: Path) -> str | None:
    """What keeps this machine from making and running an image under ``folder``; None: nothing does."""
    programs = ("buildah", "debootstrap", "unshare", "nsenter")
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install buildah debootstrap util-linux"
    if os.geteuid() != 0:
        return "these tests need root, for debootstrap and for namespaces"
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        return f"{folder} has {free / 1e9:.0f} GB free, and an image takes {DISK_BYTES / 1e9:.0f}: set TMPDIR"
    return None


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Its standard output. Raises RuntimeError with all it wrote when it fails."""
    ran = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, errors="replace"
    )
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {ran.returncode}:\n{ran.stdout}\n{ran.stderr}")
    return ran.stdout
