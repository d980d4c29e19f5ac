"""A site of four machines on which `cluster.yaml` and `serve_config.yaml` are brought up as an operator does it.

`console` has a checkout and calls `ray up`; `node-a` is the head with two GPUs, `node-b` and `node-c` have one each.
GPUs are logical, checkpoints tiny, and the environment is this machine's, mounted where `cluster.yaml` would install
it. What is changed in the two files is what a site changes: addresses, sizes, checkpoints; API keys are set, so that it
listens on every address. Programs of Ray are called on the hosts only, and by their user.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from app import keys
from tests.app import hosts, small_service
from tests.app.load import picture
from tests.train import small_models
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
#: Host, and the last part of its address.
NUMBERS = {"console": 10, "node-a": 11, "node-b": 12, "node-c": 13}
NODES = ("node-a", "node-b", "node-c")
HEAD, LOST = "node-a", "node-b"
PORT = 8000
#: Where a node keeps the tiny checkpoints.
MODELS = f"/home/{hosts.USER}/models"
#: This machine has two cores for all of them: CPUs are logical. Workers are started when they are wanted.
_SIZES = """export HEAD_CPUS=32 WORKER_CPUS=32 OBJECT_STORE_BYTES=104857600
export RAY_enable_worker_prestart=0
"""
# What a training job sees: what is left, and where a task that wants a whole GPU gets it.
_TRAINING = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
@ray.remote(num_gpus=1, num_cpus=1)
class Training:
    def place(self):
        return ray.util.get_node_ip_address()
    def waiting(self):
        from train.giving_way import waiting_replicas
        return waiting_replicas("GPU")
left = ray._private.state.available_resources_per_node()
left = {node["NodeManagerAddress"]: left[node["NodeID"]].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]}
tasks = [Training.remote() for _ in range(2)]
training = sorted(ray.get([task.place.remote() for task in tasks], timeout=120))
waiting = ray.get([task.waiting.remote() for task in tasks], timeout=120)
print(json.dumps({"left": left, "training": training, "waiting": waiting}))
"""


def cluster_yaml(text: str, workers: Sequence[str]) -> str:
    """`cluster.yaml` with the addresses of this site: nothing else is changed."""
    head = f"{hosts.NETWORK}.{NUMBERS[HEAD]}"
    addresses = [f"{hosts.NETWORK}.{NUMBERS[name]}" for name in workers]
    text = text.replace("workers: &workers [10.0.0.12]", f"workers: &workers [{', '.join(addresses)}]")
    text = text.replace("10.0.0.11", head)
    assert yaml.safe_load(text)["provider"] == {"type": "local", "head_ip": head, "worker_ips": addresses}
    return text


def serve_config(detectors: int = 1) -> dict[str, Any]:
    """`serve_config.yaml` with tiny checkpoints, a tagger that computes on a CPU and holds its logical GPU, an ingress
    on each of three nodes, and open to others than itself.
    """
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"] |= {"host": "0.0.0.0"}
    application = config["applications"][0]
    application["args"]["limits"] |= {"decode_threads": 2}
    small = {"device": "cpu", "threads": 1, "kv_cache_bytes": 2**26, "max_model_len": 1024}
    wanted = application["args"]["tagger"]
    bundle = {"CPU": wanted["num_cpus"], "GPU": wanted["num_gpus"]}
    for name in ("tagger", "tagger_canary"):
        application["args"][name] = application["args"][name] | small
    for deployment in application["deployments"]:
        name = deployment["name"]
        if name.startswith(("Detector", "Captioner", "Tagger")):
            deployment["user_config"]["uri"] = f"{MODELS}/{name.removesuffix('Canary').lower()}"
        if name.startswith("Tagger"):
            deployment["placement_group_bundles"] = [bundle]
        if name == "Ingress":
            deployment["max_replicas_per_node"] = 1
            deployment["autoscaling_config"] |= {"min_replicas": len(NODES), "max_replicas": len(NODES)}
        if name == "Detector":
            deployment["autoscaling_config"]["min_replicas"] = detectors
    return config


def write_models(folder: Path) -> None:
    """Checkpoints of a few megabytes, in the architectures that are served."""
    small_models.small_detector(folder / "detector")
    small_service.small_reference(folder / "detector")
    small_models.small_captioner(folder / "captioner")
    small_service.small_tagger(folder / "tagger")


@dataclass
class Cluster:
    """The site with Ray on it."""

    site: hosts.Site
    key: str

    def host(self, name: str) -> hosts.Host:
        return self.site.hosts[name]

    @property
    def head(self) -> hosts.Host:
        return self.host(HEAD)

    def url(self, name: str) -> str:
        return f"http://{self.host(name).address}:{PORT}"

    def name_of(self, address: str) -> str:
        return next(host.name for host in self.site.hosts.values() if host.address == address)

    def lists(self, *workers: str) -> None:
        """Write `cluster.yaml` of the checkout for these workers."""
        self.host("console").run(
            "cat >~/release/cluster.yaml", given=cluster_yaml((ROOT / "cluster.yaml").read_text(), workers)
        )

    def launch(self, command: str, timeout_s: float = 900) -> str:
        """Call Ray's launcher where the checkout is; returns what it printed."""
        done = self.host("console").run(
            f"cd ~/release && PATH=$HOME/deeptrust/venv/bin:$PATH RAY_AUTH_MODE=token {command}", timeout_s
        )
        return done.stdout + done.stderr

    def on_head(self, command: str, timeout_s: float = 300, given: str | None = None) -> str:
        """Run a command as the runbook says: on the head, in the code, in the cluster's environment."""
        return self.head.run(
            f". ~/deeptrust/cluster.env && cd ~/deeptrust/code && {command}", timeout_s, True, given
        ).stdout

    def dashboard(self, path: str) -> Any:
        """What the head's dashboard answers, asked on the head and with its token."""
        ask = f'curl -sSf -m 30 -H "Authorization: Bearer $(cat ~/.ray/auth_token)" http://127.0.0.1:8265{path}'
        return json.loads(self.head.run(ask).stdout)

    def nodes(self) -> list[str]:
        """Nodes that Ray counts on."""
        rows = self.dashboard("/api/v0/nodes")["data"]["result"]["result"]
        return sorted(self.name_of(row["node_ip"]) for row in rows if row["state"] == "ALIVE")

    def application(self) -> dict[str, Any]:
        """State of the application, and of its deployments."""
        return dict(self.dashboard("/api/serve/applications/")["applications"]["deeptrust"])

    def is_whole(self) -> bool:
        """Whether every replica that should be there is."""
        found = self.application()
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return str(found["status"]) == "RUNNING"

    def running(self, name: str) -> str:
        """Processes of Ray on a node, one a line."""
        return self.host(name).run("pgrep -l 'raylet|gcs_server|ray|python'", check=False).stdout

    def placement(self) -> dict[str, list[str]]:
        """Nodes of the running replicas of each deployment."""
        return {
            name: sorted(
                self.name_of(replica["node_ip"]) for replica in deployment["replicas"] if replica["state"] == "RUNNING"
            )
            for name, deployment in self.application()["deployments"].items()
        }

    def proxies(self) -> dict[str, str]:
        """State of Serve's proxy on each node that has one."""
        found = self.dashboard("/api/serve/applications/")["proxies"]
        return {self.name_of(proxy["node_ip"]): proxy["status"] for proxy in found.values()}

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy`, as the runbook has it."""
        self.on_head("cat > serve_config.yaml && serve deploy serve_config.yaml", given=yaml.safe_dump(config))

    def what_training_gets(self) -> dict[str, Any]:
        """GPUs left on each node, where two tasks that want a whole one run, and which replicas, as each is told,
        wait for what it holds.
        """
        found = json.loads(self.on_head("python -", given=_TRAINING).strip().splitlines()[-1])
        return {
            "left": {self.name_of(address): gpus for address, gpus in found["left"].items()},
            "training": [self.name_of(address) for address in found["training"]],
            "waiting": found["waiting"],
        }


def wait_until(
    condition: Callable[[], Any], what: Callable[[], str] | str, timeout_s: float, every_s: float = 1.0
) -> float:
    """Wait until something holds; returns the seconds that it took. What fails while machines are away counts as no."""

    def holds() -> bool:
        with contextlib.suppress(hosts.HostsError, httpx.HTTPError, KeyError, ValueError, subprocess.TimeoutExpired):
            return bool(condition())
        return False

    started = time.monotonic()
    wait_for(holds, timeout_s, every_s, what)
    return time.monotonic() - started


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Cluster]:
    """The four machines, on, as an operator finds them: users, keys, files of `/etc/deeptrust`, no Ray."""
    write_models(folder / "models")
    key = keys.create(folder / "keys.json", "gateway", frozenset({"read"}), 1000.0, 1000)
    with hosts.site(folder / "site") as site:
        for name, number in NUMBERS.items():
            host = site.add(name, number)
            host.write("/etc/deeptrust/node", _SIZES)
            host.write("/etc/deeptrust/keys.json", (folder / "keys.json").read_text())
            # where `cluster.yaml` installs the list, and the note that it has been
            if name in NODES:
                (host.folder / "venv" / "installed.txt").write_bytes((ROOT / "requirements" / "gpu.txt").read_bytes())
                subprocess.run(["cp", "-r", str(folder / "models"), str(host.home / "models")], check=True)
        console = site.hosts["console"]
        release = console.home / "release"
        release.mkdir()
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        subprocess.run(
            ["rsync", "-a", "--from0", "--files-from=-", "--ignore-missing-args", f"{ROOT}/", f"{release}/"],
            input=listed,
            check=True,
        )
        console.write(".ssh/deeptrust", site.key.read_text(), 0o600)
        for host in site.hosts.values():
            hosts.own(host.home)
            host.power_on()
        yield Cluster(site, key)


@dataclass
class Answered:
    """One request, until it was answered."""

    started: float
    seconds: float
    attempts: list[str]
    """What became of each attempt: `NODE STATUS`, or `NODE ERROR`."""
    body: dict[str, Any]


@dataclass
class Load:
    """Clients of the site's network that post one new picture after another, to one node after another, and pause in
    between: two cores are all nodes', and what is to start needs some of them. What a node does not answer, or answers
    with 429 or 5xx, they send to the next one, under the same id.
    """

    cluster: Cluster
    clients: int
    timeout_s: float = 30.0
    give_up_s: float = 300.0
    pause_s: float = 0.5
    answers: list[Answered] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        self.cluster.site.enter()
        timeout = httpx.Timeout(self.timeout_s, connect=3.0)
        with httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {self.cluster.key}"}) as client:
            turn = 0
            while not self._over.is_set():
                try:
                    self.answers.append(self._ask(client, number, turn))
                except Exception as error:
                    self.failures.append(f"client {number}, request {turn}: {error!r}")
                turn += 1
                self._over.wait(self.pause_s)

    def _ask(self, client: httpx.Client, number: int, turn: int) -> Answered:
        started, attempts = time.monotonic(), list[str]()
        while time.monotonic() - started < self.give_up_s:
            node = NODES[(number + turn + len(attempts)) % len(NODES)]
            try:
                answer = client.post(
                    f"{self.cluster.url(node)}/v1/analyze",
                    content=picture(number * 1_000_000 + turn),
                    headers={"Content-Type": "image/png", "X-Request-ID": f"load-{number}-{turn}"},
                )
            except httpx.HTTPError as error:
                attempts.append(f"{node} {type(error).__name__}")
            else:
                attempts.append(f"{node} {answer.status_code}")
                if answer.status_code == 200 and not answer.json()["errors"]:
                    return Answered(started, time.monotonic() - started, attempts, answer.json())
                if answer.status_code not in (200, 408, 429) and answer.status_code < 500:
                    raise AssertionError(f"{answer.status_code}: {answer.text[:300]}")
                if answer.status_code == 200:
                    attempts[-1] += " " + ",".join(sorted(error["code"] for error in answer.json()["errors"]))
            time.sleep(min(0.2 * 2 ** len(attempts), 3.0))
        raise AssertionError(f"given up after {attempts}")

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """What clients saw of the requests that ended in a span of `time.monotonic`."""
        ended = [answer for answer in self.answers if begin <= answer.started + answer.seconds < end]
        times = sorted(answer.seconds for answer in ended)
        again: dict[str, int] = {}
        for answer in ended:
            for attempt in answer.attempts[:-1]:
                again[attempt] = again.get(attempt, 0) + 1
        return {
            "seconds": round(end - begin, 1),
            "answers": len(ended),
            "answers_per_s": round(len(ended) / (end - begin), 2),
            "p50_s": round(times[len(times) // 2], 2) if times else None,
            "longest_s": round(times[-1], 2) if times else None,
            "sent_again": dict(sorted(again.items())),
            "answered_by": {
                node: sum(answer.attempts[-1].startswith(f"{node} ") for answer in ended) for node in NODES
            },
        }
