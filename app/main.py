"""The whole graph on one screen.

    picture -> Ingress -> Detector ------------------> joined answer
                      \\-> Captioner -> Tagger -----/

Detector and captioner both need only the picture and run side by side; the tagger reads the caption. Each model is a
deployment of its own and scales by its own load; each has a twin for a canary revision, at zero replicas until it is
given a share of the traffic. Beside them one replica watches a sample of what the detector answers for drift. Serve
calls ``build`` with the ``args`` of a configuration file (``serve_config.yaml``); what runs where, in how many replicas
and with which checkpoint stands in that file's ``deployments``.
"""

# No postponed annotations here: Ray reads the annotation of `build` itself to validate `args` against it.
from typing import Any

from ray import serve
from ray.serve import Application

from app.config import CANARIES, INGRESS, MODELS, WATCHER, AppArgs
from app.ingress import Ingress
from deployments.captioner import Captioner
from deployments.detector import Detector
from deployments.drift import Drift
from deployments.tagger import build_tagger


def build(args: AppArgs) -> Application:
    """The application that ``serve_config.yaml`` and ``make serve`` deploy."""
    # A replica that is to end (another version, fewer of them, a node that is drained) finishes what it has accepted:
    # that takes a request's whole time at most, and Serve's 20 s would cut the longest off
    ending: dict[str, Any] = {
        "graceful_shutdown_timeout_s": args.limits.request_timeout_s + 5,
        "graceful_shutdown_wait_loop_s": 0.5,
    }

    def deployment(kind: type, name: str) -> serve.Deployment:
        return serve.deployment(kind, name=name, **ending)

    detector = deployment(Detector, MODELS["detector"]).bind()
    return deployment(Ingress, INGRESS).bind(
        args.limits,
        {
            "detector": detector,
            "captioner": deployment(Captioner, MODELS["captioner"]).bind(),
            "tagger": build_tagger(args.tagger, MODELS["tagger"], **ending),
        },
        {
            "detector": deployment(Detector, CANARIES["detector"]).bind(),
            "captioner": deployment(Captioner, CANARIES["captioner"]).bind(),
            **(
                {"tagger": build_tagger(args.tagger_canary, CANARIES["tagger"], **ending)} if args.tagger_canary else {}
            ),
        },
        args.store,
        args.callbacks,
        args.drift,
        deployment(Drift, WATCHER).bind(detector),
    )
