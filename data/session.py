"""A Ray to work on: the cluster of the job or of ``RAY_ADDRESS``, otherwise one of the program's own for its lifetime.

In: how large an own Ray may be. Out: a context in which Ray and Ray Data are ready and set up for small machines; an
own Ray is gone when it ends. Knows no data set and no model.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_ROOT = Path(__file__).parent.parent
#: Attempts to start an own Ray.
_STARTS = 5
#: Where Ray's processes ask about its actors.
_API = "RAY_API_SERVER_ADDRESS"


def gpus_hidden(reserved: float) -> dict[str, str]:
    """Environment of a process that reserves so much of a GPU: without any it is to see none. Ray hides them only from
    those that have reserved others, and it would compute on a node's first, beside whoever has that.
    """
    return {} if reserved else {"CUDA_VISIBLE_DEVICES": ""}


class RaySettings(BaseModel):
    """How an own Ray is started; a cluster that is there already is taken as it is."""

    model_config = ConfigDict(extra="forbid")

    num_cpus: int | None = Field(None, ge=1, description="CPUs of an own Ray; all of the machine's if not given")
    object_store_bytes: int = Field(512 * 2**20, ge=78 * 2**20, description="shared memory of an own Ray")


@contextmanager
def ray_session(settings: RaySettings | None = None, state_api: bool = False) -> Iterator[int]:
    """Ray for the block, and how many CPUs it has.

    A Ray that this process is connected to already is used and left alone. Inside a job, or where ``RAY_ADDRESS`` is
    set, it connects to that cluster and only disconnects at the end. Else it starts one that listens on loopback,
    without dashboard, and stops it.

    Args:
        state_api: an own Ray answers questions about its actors, which its dashboard does: Ray Train asks them to give
            back what a run had reserved whose controller was killed, as Tune does to the trials that it stops. They
            are told where it is: left to look for it, who finds another instance beside this one gives up for good.
    """
    # read once, when Ray is imported: without it 127.0.0.1 is taken for the machine's own address, open to everybody
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    own_connection, told = not ray.is_initialized(), os.environ.get(_API)
    try:
        if own_connection:
            _connect(settings or RaySettings(), state_api)
        cpus = max(1, math.floor(ray.cluster_resources().get("CPU", 1)))
        with _data_context(cpus):
            yield cpus
    finally:
        if own_connection:
            ray.shutdown()
            if told is None:
                os.environ.pop(_API, None)
            else:
                os.environ[_API] = told


def _connect(settings: RaySettings, state_api: bool) -> None:
    """The cluster of ``RAY_ADDRESS``, or a Ray of its own."""
    import ray

    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        ray.init(**common)
    else:
        # workers find the code, and do not yield to every other process of the machine (Ray nices them to 15)
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        defaults = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
        os.environ.update({name: value for name, value in defaults.items() if name not in os.environ})
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        _start(settings, common, state_api)


def _start(settings: RaySettings, common: dict[str, Any], dashboard: bool) -> None:
    """Start an own Ray; again if it does not come up.

    Its node waits 15 seconds for agents of its own, a fixed time (ray-project/ray#65983), and ends without them: what
    they import takes longer on busy cores.
    """
    import psutil
    import ray

    this = psutil.Process()
    for left in reversed(range(_STARTS)):
        before = set(this.children())
        port = _free_port(8265) if dashboard else None  # Ray's own, where people look for it
        if dashboard:
            os.environ[_API] = f"http://127.0.0.1:{port}"
        try:
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                object_store_memory=settings.object_store_bytes,
                include_dashboard=dashboard,
                dashboard_port=port,
                _node_ip_address="127.0.0.1",
                **common,
            )
            return
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or not left:
                raise
        print("Ray did not come up in time, the machine is busy: starting it again", file=sys.stderr, flush=True)
        half = set(this.children()) - before
        for process in half:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(half, timeout=30)


def _free_port(wanted: int) -> int:
    """A loopback port that is free: ``wanted``, if that is."""
    for port in (wanted, 0):
        with suppress(OSError), socket.socket() as server:
            server.bind(("127.0.0.1", port))
            return int(server.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


@contextmanager
def _data_context(cpus: int) -> Iterator[None]:
    """Ray Data's settings for the block: as many blocks as the CPUs can use instead of 200, bars on terminals only."""
    from ray.data import DataContext

    context = DataContext.get_current()
    wanted = {
        "min_parallelism": 2 * cpus,
        "read_op_min_num_blocks": 2 * cpus,
        "default_hash_shuffle_parallelism": 2 * cpus,
        "enable_progress_bars": sys.stderr.isatty(),
        "print_on_execution_start": False,
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    # a line for each execution and its plan is for those who work on Ray Data
    chatty = logging.getLogger("ray.data")
    level = chatty.level
    chatty.setLevel(logging.WARNING)
    try:
        yield
    finally:
        chatty.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
