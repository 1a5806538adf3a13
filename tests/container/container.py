"""An image's files and configuration as running processes, where no container engine can run.

Namespaces of their own (processes, mounts, host name, IPC), the image's root, user, entry point, variables and
working directory, and volumes: what an engine sets up, by util-linux. The network is the host's, and memory is not
limited. The entry point is process 1, so a signal to it is what ``docker stop`` sends, and SIGKILL to it ends all that
there is, as ``docker kill`` does.
"""

import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.container.tools import run


@dataclass(frozen=True)
class Image:
    """A built image, its files mounted."""

    root: Path
    configuration: dict[str, Any]  # the OCI image's: Env, User, Entrypoint, WorkingDir

    @classmethod
    def mount(cls, name: str) -> "Image":
        container = run("buildah", "from", "--pull-never", name).strip()
        root = Path(run("buildah", "mount", container).strip())
        described = json.loads(run("buildah", "inspect", "--type", "image", name))
        return cls(root, described["OCIv1"]["config"])

    def owner(self, path: str) -> tuple[int, int]:
        stat = (self.root / path.lstrip("/")).stat()
        return stat.st_uid, stat.st_gid

    def user(self) -> tuple[int, int, str]:
        """User id, group id and home of the image's user."""
        for line in (self.root / "etc" / "passwd").read_text().splitlines():
            name, _, uid, gid, _, home, _ = line.split(":")
            if name == self.configuration["User"]:
                return int(uid), int(gid), home
        raise LookupError(f"{self.configuration['User']!r} is no user of the image")


@dataclass
class Container:
    image: Image
    log_file: Path
    environment: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, Path] = field(default_factory=dict)  # by their place in the container
    hostname: str = "trl"
    _outer: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        root = self.image.root
        mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"hostname {self.hostname}"]
        # An engine writes it.
        (root / "etc" / "hosts").write_text(f"127.0.0.1 localhost {self.hostname}\n")
        for place, source in self.volumes.items():
            target = root / place.lstrip("/")
            target.mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(target))}")
        inside = shlex.join(
            ["exec", "setpriv", "--no-new-privs", *self._entered(self.image.configuration["Entrypoint"])]
        )
        namespaces = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=SIGKILL"]
        with self.log_file.open("ab") as log:
            self._outer = subprocess.Popen(
                [*namespaces, "sh", "-ec", "; ".join([*mounts, inside])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not self.processes() and self._outer.poll() is None:
            time.sleep(0.01)

    def _entered(self, command: list[str]) -> list[str]:
        """The command, in the image's root as its user."""
        uid, gid, home = self.image.user()
        described = dict(variable.split("=", 1) for variable in self.image.configuration["Env"])
        variables = {**described, "HOME": home, **self.environment}
        settings = [f"{name}={value}" for name, value in variables.items()]
        enter = ["chroot", f"--userspec={uid}:{gid}", str(self.image.root)]
        return [*enter, "/usr/bin/env", "-i", "-C", self.image.configuration["WorkingDir"], *settings, *command]

    def processes(self) -> list[psutil.Process]:
        """Process 1 and all its descendants; empty once they are gone."""
        assert self._outer is not None
        try:
            return psutil.Process(self._outer.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A further command in it, as ``docker exec`` and health checks run one."""
        first = self.processes()[0].pid
        namespaces = ["nsenter", "--target", str(first), "--mount", "--pid", "--uts", "--ipc"]
        entered = [*namespaces, *self._entered(list(command))]
        return subprocess.run(entered, capture_output=True, text=True, timeout=60)

    def stop(self, seconds: float) -> int:
        """SIGTERM to process 1, as ``docker stop`` sends. Returns the exit status.

        Raises subprocess.TimeoutExpired when it has not ended in time.
        """
        assert self._outer is not None
        os.kill(self.processes()[0].pid, signal.SIGTERM)
        return self._outer.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to process 1, with which the kernel ends all the others, as ``docker kill`` does."""
        assert self._outer is not None
        family = self.processes()
        if family:
            family[0].kill()
        self._outer.wait(30)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, alive

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")
