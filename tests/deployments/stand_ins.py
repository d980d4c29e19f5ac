"""The production graph with nothing in it: what tests of placement deploy where there is no GPU.

`build` is `app.main.build` itself, with classes in the models' places that hold no model and say where they run.
"""

# No postponed annotations here: Ray reads the annotation of `build`.
from typing import Any

import ray
from ray.serve import Application

from app.config import AppArgs


class StandIn:
    """Holds the resources of a replica, or of training."""

    def __init__(self, *args: Any) -> None:
        pass

    def reconfigure(self, user_config: Any) -> None:
        """Any configuration will do."""

    def place(self) -> str:
        """Node and GPU, as `NODE:GPU`."""
        return f"{ray.get_runtime_context().get_node_id()}:{','.join(map(str, ray.get_gpu_ids()))}"


def build(args: AppArgs) -> Application:
    """`app.main.build` with stand-ins."""
    from app import main
    from deployments import tagger

    main.Ingress = main.Drift = main.Detector = main.Captioner = tagger.Tagger = StandIn  # type: ignore[misc]
    return main.build(args)
