"""A PostgreSQL server of a test's own, from the machine's own programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from app import cluster


def find_programs() -> Path | None:
    """Where the newest PostgreSQL of this machine is; None: there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found:
        return found[-1]
    program = shutil.which("pg_ctl")
    return Path(program).resolve().parent if program else None


@dataclass
class Postgres:
    """A running server."""

    folder: Path
    port: int
    programs: Path
    user: list[str]

    def url(self, database: str) -> str:
        """URL of a database, which is made if there is none."""
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone()
            if known is None:
                connection.execute(f'CREATE DATABASE "{database}"')
        return self._address(database)

    def _address(self, database: str) -> str:
        return f"postgresql://deeptrust@127.0.0.1:{self.port}/{database}"

    def start(self, *settings: str) -> None:
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=''", *settings)
        options = f"-p {self.port} " + " ".join(f"-c {setting}" for setting in settings)
        self.run(
            "pg_ctl", "-D", str(self.folder), "-w", "-t", "120", "-l", f"{self.folder}/log", "-o", options, "start"
        )

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder), "-m", "immediate", "stop")

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.programs / program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)


@contextmanager
def postgres_server(*settings: str) -> Iterator[Postgres]:
    """A server with files of its own, stopped afterwards.

    Raises:
        RuntimeError: this machine has no PostgreSQL.
    """
    programs = find_programs()
    if programs is None:
        raise RuntimeError("no PostgreSQL found: apt-get install postgresql")
    # not in a folder of pytest's: every session that starts closes that to other users, and the server is one
    with tempfile.TemporaryDirectory(prefix="deeptrust-postgres-", ignore_cleanup_errors=True) as above:
        folder = Path(above) / "data"
        folder.mkdir(mode=0o700)
        user: list[str] = []
        if os.getuid() == 0:  # the server refuses to run as root
            user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(above, "postgres")
            shutil.chown(folder, "postgres")
        server = Postgres(folder, cluster.free_port(), programs, user)
        server.run("initdb", "-D", str(folder), "-U", "deeptrust", "--auth", "trust", "--no-sync", "--encoding=UTF8")
        server.start(*settings)
        try:
            yield server
        finally:
            server.stop()
