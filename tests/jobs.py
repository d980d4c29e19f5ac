"""`ray job` against a cluster with token authentication, as an engineer types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app import cluster

ROOT = Path(__file__).parents[1]


@dataclass
class Jobs:
    """The jobs of a cluster."""

    instance: cluster.Instance
    variables: dict[str, str] = field(default_factory=dict)
    """Of every job's environment."""

    def run(
        self, verb: str, *options: str, entry: tuple[str, ...] = (), token: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`ray job VERB`, with the cluster's token or without any."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "job", verb),
                *("--address", self.instance.dashboard_url, *options),
                *(("--", *entry) if entry else ()),
            ],
            cwd=ROOT,
            env=cluster.environment(self.instance.port) | ({} if token else {"RAY_AUTH_MODE": "disabled"}),
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )

    def submit(self, name: str, *entry: str, wait: bool = True, token: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python -m ENTRY`, to its end or not."""
        options = ["--submission-id", name, "--working-dir", ".", *(() if wait else ("--no-wait",))]
        if self.variables:
            options += ["--runtime-env-json", json.dumps({"env_vars": self.variables})]
        return self.run("submit", *options, entry=(sys.executable, "-m", *entry), token=token)

    def status(self, name: str) -> str:
        """What `ray job status` says, in small letters."""
        return self.run("status", name).stdout.lower()

    def wait_for(self, name: str, text: str, timeout_s: float = 600) -> None:
        """Until a running job has printed something."""
        limit = time.monotonic() + timeout_s
        while text not in (told := self.run("logs", name).stdout):
            assert time.monotonic() < limit and self.status(name).count("failed") == 0, told[-4000:]
            time.sleep(1)

    def stop_when(self, name: str, condition: Callable[[], bool], timeout_s: float = 600) -> None:
        """Stop a running job at a moment."""
        limit = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > limit:
                raise AssertionError(f"{name} did not come so far:\n{self.run('logs', name).stdout[-4000:]}")
            time.sleep(0.05)
        stopped = self.run("stop", name)
        assert stopped.returncode == 0, stopped.stderr
        assert "stopped" in (told := self.status(name)), told
