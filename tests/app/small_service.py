"""The real application with tiny models: what production runs, in every part, on checkpoints of a few megabytes.

`small_service` starts `python -m app.serve` in a process of its own: Ray, Serve, ingress, a ViT, a BLIP and a Llama on
vLLM, with weights drawn at random. What they say is nonsense; that they say it, how they are exchanged and what
becomes of them when their processes die is what tests look at. Vocabulary and chat template are the starter tagger's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import psutil
import yaml

from app import cluster
from app.config import read_serve_config
from app.serve import deploy
from tests.serving import ROOT, served, starting

#: A request's whole time: short, because tests wait for requests that run out of it.
REQUEST_TIMEOUT_S = 12.0
#: What the tagger takes before it refuses: few, because tests fill it.
TAGGER_REQUESTS = 2


def small_tagger(folder: Path, seed: int = 0) -> Path:
    """A Llama of one layer with the starter tagger's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deployments.checkpoints import resolve

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(resolve("starter:tagger").folder / name, folder / name)
    return folder


def small_reference(folder: Path) -> None:
    """Gives a small detector a reference for drift: pictures as `tests.app.load` sends them, a window of 32."""
    import io

    from deployments.checkpoints import resolve
    from deployments.detector import DetectorModel
    from deployments.drift_statistic import FILE, DriftSettings, make_reference
    from tests.train.small_models import noise
    from train.drift_reference import observe

    pictures = []
    for number in range(96):
        buffer = io.BytesIO()
        noise(9_000_000 + number, (64, 48)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    seen = observe(DetectorModel(resolve(str(folder))), pictures, len(pictures))
    settings = DriftSettings(
        window=32, step=8, dimensions=8, most=72, held_out=0.5, splits=4, stream=4_000, between_alarms=2_000
    )
    make_reference(seen.embeddings, seen.margins, seen.statistics, settings).save(folder / FILE)


def write_config(
    folder: Path, tell: tuple[str, ...] = (), change: Callable[[dict[str, Any]], None] | None = None, **limits: Any
) -> Path:
    """`serve_config.cpu.yaml` with tiny models: `detector-0`, `detector-1` and so on lie beside it.

    Args:
        tell: addresses that may be called back.
        change: of the configuration, before it is written.
    """
    from tests.train import small_models

    for seed in (0, 1, 2):
        # the second one looks at larger pictures than the first: what is exchanged under load is not only weights
        with mock.patch.object(small_models, "SIDE_PX", 48 if seed == 1 else 32):
            small_models.small_detector(folder / f"detector-{seed}", seed)
            small_models.small_captioner(folder / f"captioner-{seed}", seed)
        small_reference(folder / f"detector-{seed}")
    config = yaml.safe_load((ROOT / "serve_config.cpu.yaml").read_text())
    application = config["applications"][0]
    application["args"]["limits"] |= {"request_timeout_s": REQUEST_TIMEOUT_S} | limits
    application["args"]["callbacks"] = {"allow": list(tell)}
    application["args"]["tagger"] |= {
        "max_ongoing_requests": TAGGER_REQUESTS,
        "max_queued_requests": 1,
        "max_replicas": 1,
        "kv_cache_bytes": 2**26,
        "max_model_len": 1024,
    }
    uris = {
        "Detector": "detector-0",
        "DetectorCanary": "detector-2",
        "Captioner": "captioner-0",
        "CaptionerCanary": "captioner-0",
        "Tagger": small_tagger(folder / "tagger").name,
        "TaggerCanary": "tagger",
    }
    for deployment in application["deployments"]:
        if deployment["name"] in uris:
            deployment["user_config"]["uri"] = str(folder / uris[deployment["name"]])
    if change is not None:
        change(config)
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class SmallService:
    """A running application with tiny models."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    config: dict[str, Any]
    while_starting: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(status of the page, what `/readyz` said), looked up again and again before the start was over."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment's part of the configuration, to be changed before `redeploy`."""
        return next(item for item in self.config["applications"][0]["deployments"] if item["name"] == name)

    def redeploy(self) -> None:
        """Hand the changed configuration to Serve, as `serve deploy` does."""
        deploy(self.instance(), self.config)

    def replicas(self, deployment: str) -> list[str]:
        """Identities of a deployment's replicas."""
        instance = self.instance()
        headers = {"Authorization": f"Bearer {cluster.token(self.port)}"}
        answer = httpx.get(f"{instance.dashboard_url}/api/serve/applications/", headers=headers, timeout=60).json()
        found = answer["applications"]["deeptrust"]["deployments"][deployment]["replicas"]
        return sorted(replica["replica_id"] for replica in found)

    def engines(self) -> list[psutil.Process]:
        """vLLM's own processes."""
        return [process for process, title in self._titles() if title.startswith("VLLM")]

    def memory_maps(self, deployment: str) -> set[str]:
        """Files that the replicas of a deployment have mapped into their memory."""
        return {
            Path(mapped.path).name
            for process, title in self._titles()
            if title.startswith("ray::ServeReplica") and f":{deployment}" in title
            for mapped in process.memory_maps()
        }

    def _titles(self) -> Iterator[tuple[psutil.Process, str]]:
        """Every process and its command line, which Ray and vLLM write over with a title; without those that ended
        since they were listed, as Ray's agents start and end short-lived ones all the time.
        """
        for process in cluster.processes(self.port):
            with suppress(psutil.Error):
                yield process, " ".join(process.cmdline())

    def listening(self) -> list[tuple[str, int]]:
        """Addresses and ports on which any process of this instance listens."""
        return sorted(
            {
                (connection.laddr.ip, connection.laddr.port)
                for process in cluster.processes(self.port)
                for connection in _connections(process)
                if connection.status == psutil.CONN_LISTEN
            }
        )

    def kill_everything(self) -> None:
        """SIGKILL for every process of it, Ray's and its starter's included."""
        processes = cluster.processes(self.port)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(processes, timeout=60)
        cluster.stop(self.port)

    def instance(self) -> cluster.Instance:
        """Its Ray: the last one, which may have been started again."""
        *_, dashboard = re.findall(r"Ray dashboard  http://127.0.0.1:(\d+)/", self.log.read_text())
        return cluster.Instance(self.port, 0, int(dashboard))


def _connections(process: psutil.Process) -> list[Any]:
    with suppress(psutil.Error):
        return process.net_connections("tcp")
    return []


@contextmanager
def small_service(
    folder: Path, tell: tuple[str, ...] = (), change: Callable[[dict[str, Any]], None] | None = None, **limits: Any
) -> Iterator[SmallService]:
    """Start it, wait until all stages are ready, and leave nothing of it behind."""
    port = cluster.free_port(8133)
    path, log = write_config(folder, tell, change, **limits), folder / "serve.log"
    with served(port, log, "--config", str(path)) as process:
        service = SmallService(folder, port, process, log, {})
        with httpx.Client(timeout=5) as http:  # one: making it takes longer than an answer does
            for _ in starting(process, log):
                with suppress(httpx.HTTPError, ValueError):
                    page, ready = http.get(f"{service.url}/"), http.get(f"{service.url}/readyz").json()
                    if "stages" in ready:  # and not a proxy's answer
                        service.while_starting.append((page.status_code, ready))
        service.config = read_serve_config(path)
        service.config["http_options"]["port"] = port
        yield service
