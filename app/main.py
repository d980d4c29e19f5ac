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
from ray import serve
from ray.serve import Application

from app.config import CANARIES, MODELS, WATCHER, AppArgs
from app.ingress import Ingress
from deployments.captioner import Captioner
from deployments.detector import Detector
from deployments.drift import Drift
from deployments.tagger import build_tagger


def build(args: AppArgs) -> Application:
    """The application that ``serve_config.yaml`` and ``make serve`` deploy."""
    detector = serve.deployment(Detector, name=MODELS["detector"]).bind()
    return serve.deployment(Ingress, name="Ingress").bind(
        args.limits,
        {
            "detector": detector,
            "captioner": serve.deployment(Captioner, name=MODELS["captioner"]).bind(),
            "tagger": build_tagger(args.tagger, name=MODELS["tagger"]),
        },
        {
            "detector": serve.deployment(Detector, name=CANARIES["detector"]).bind(),
            "captioner": serve.deployment(Captioner, name=CANARIES["captioner"]).bind(),
            **({"tagger": build_tagger(args.tagger_canary, name=CANARIES["tagger"])} if args.tagger_canary else {}),
        },
        args.store,
        args.callbacks,
        args.drift,
        serve.deployment(Drift, name=WATCHER).bind(detector),
    )
