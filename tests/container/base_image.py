"""An image that stands in for ``python:3.12-slim``, for machines that reach Debian's packages but no image registry.

It has Debian's minimal system, as the real one has, and this machine's Python 3.12 and uv in /usr/local (the real one
has pip there, with which the image gets uv). This machine's settings for package indexes and certificates are copied
into it, and so reach the build without being written into the project.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.container.tools import run

NAME = "docker.io/library/python:3.12-slim"
UV_CACHE = "/var/cache/uv"

_INDEX_VARIABLES = re.compile(
    r"PIP_\w+|UV_(\w*INDEX\w*|FIND_LINKS|NATIVE_TLS|HTTP_TIMEOUT)|https?_proxy|no_proxy", re.I
)
_INDEX_FILES = ("/etc/pip.conf", "/etc/uv/uv.toml", "~/.config/uv/uv.toml")
_CERTIFICATES = "/usr/local/share/this-machine.crt"


def make_base_image(folder: Path) -> None:
    """Make the image ``NAME`` in the store that CONTAINERS_STORAGE_CONF names. ``folder`` is for its files."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    root = folder / "root"
    # The machine's own release: its Python was made for it.
    run("debootstrap", "--variant=minbase", "--include=ca-certificates", release, root)
    _copy_python(root)
    environment = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", "UV_CACHE_DIR": UV_CACHE}
    environment |= _copy_index_settings(root)
    container = run("buildah", "from", "scratch").strip()
    run("buildah", "copy", "--quiet", container, root, "/")
    settings = [part for item in environment.items() for part in ("--env", "=".join(item))]
    run("buildah", "config", *settings, "--cmd", "python3", container)
    run("buildah", "commit", "--quiet", "--rm", container, NAME)
    shutil.rmtree(root)


def _copy_python(root: Path) -> None:
    local = root / "usr" / "local"
    stdlib = Path(sysconfig.get_path("stdlib"))
    programs, libraries = local / "bin", local / "lib"
    shutil.copy(Path(sys.executable).resolve(), programs / "python3.12")
    for name in ("python3", "python"):
        (programs / name).symlink_to("python3.12")
    shutil.copy(Path(sys.executable).with_name("uv"), programs / "uv")
    absent = shutil.ignore_patterns("site-packages", "dist-packages", "test", "idlelib", "_tkinter*", "__pycache__")
    shutil.copytree(stdlib, libraries / "python3.12", ignore=absent, symlinks=True)
    (libraries / "python3.12" / "site-packages").mkdir()
    shutil.copytree(sysconfig.get_path("include"), local / "include" / "python3.12")
    binaries = [programs / "python3.12", *(libraries / "python3.12" / "lib-dynload").glob("*.so")]
    needed = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=True).stdout
    for library in sorted(set(re.findall(r"=> (/\S+)", needed))):
        if not (root / library.lstrip("/")).exists():
            shutil.copy(library, libraries)
    run("chroot", root, "ldconfig")


def _copy_index_settings(root: Path) -> dict[str, str]:
    """Returns the variables that belong to them."""
    for name in _INDEX_FILES:
        path = Path(name).expanduser()
        if path.is_file():
            copy = root / str(path).lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    environment = {name: value for name, value in os.environ.items() if _INDEX_VARIABLES.fullmatch(name)}
    if certificates := os.environ.get("SSL_CERT_FILE"):
        shutil.copy(certificates, root / _CERTIFICATES.lstrip("/"))
        certified = [name for name in ("SSL_CERT_FILE", "PIP_CERT") if name in os.environ]
        environment |= dict.fromkeys(certified, _CERTIFICATES)
    return environment
