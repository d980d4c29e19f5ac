"""This project serving the detector only: ``app.main.build`` with, in the captioner's and the tagger's places, models
that take no time and are never asked. There is no setting yet that leaves them out.
"""

# No postponed annotations here: Ray reads the annotation of `build`.
from pathlib import Path
from typing import Any

import yaml
from ray.serve import Application

from app.config import AppArgs
from benchmarks.stand_ins import SleepingCaptioner, SleepingTagger

_CONFIG = Path(__file__).parents[2] / "serve_config.cpu.yaml"


def build(args: AppArgs) -> Application:
    """The graph with the real detector only."""
    from app import main
    from deployments import tagger

    main.Captioner = SleepingCaptioner  # type: ignore[assignment,misc]
    tagger.Tagger = SleepingTagger  # type: ignore[assignment,misc]
    return main.build(args)


def configuration(port: int, uri: str, batch: int, wait_s: float, replicas: int, threads: int) -> dict[str, Any]:
    """``serve_config.cpu.yaml`` for that graph; nothing is kept, as none of the others keeps anything."""
    config: dict[str, Any] = yaml.safe_load(_CONFIG.read_text())
    config["http_options"]["port"] = port
    application = config["applications"][0]
    application["import_path"] = "benchmarks.peers.project:build"
    application["args"]["store"] = {"keep": "off"}
    application["args"]["limits"] |= {"max_in_flight": 64, "max_wait_s": 60}
    application["args"]["tagger"] |= {"num_cpus": 0.01, "max_replicas": 1}
    application["args"]["tagger_canary"] = None
    application["deployments"] = [one for one in application["deployments"] if one["name"] != "TaggerCanary"]
    for one in application["deployments"]:
        if one["name"].endswith("Canary"):
            continue  # at zero replicas, as they are
        if one["name"] != "Ingress":
            one["user_config"] = {"uri": "stand-in:0+0x1"}
            one.pop("autoscaling_config", None)
        if one["name"] == "Captioner":
            one["ray_actor_options"] = {"num_cpus": 0.01}
        if one["name"] == "Detector":
            one["user_config"] = {"uri": uri, "max_batch_size": batch, "batch_wait_timeout_s": wait_s}
            one |= {"max_ongoing_requests": 96, "max_queued_requests": 96, "num_replicas": replicas}
            one["ray_actor_options"]["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
    return config
