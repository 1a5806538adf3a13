"""A real PostgreSQL server for tests: its own data directory and port, ended with the context."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stack_server import free_port


def server_programs() -> Path | None:
    """The folder of initdb and postgres: on the PATH, or where Debian keeps it. None: no server is installed."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextmanager
def postgresql_server(programs: Path) -> Iterator[str]:
    """Yields a URL for SQLAlchemy. PostgreSQL refuses to run as root, so there it runs as the user ``postgres``."""
    folder = Path(tempfile.mkdtemp(prefix="trl-remote-postgresql-"))
    port = free_port()
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, "postgres")
    data = folder / "data"
    control = [*user, str(programs / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-w"]
    try:
        initdb = [*user, str(programs / "initdb"), "-D", str(data), "-U", "trl", "--auth=trust", "--encoding=UTF8"]
        subprocess.run([*initdb, "--no-sync"], check=True, capture_output=True)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True)
        try:
            yield f"postgresql+psycopg://trl@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True)
    finally:
        shutil.rmtree(folder)
