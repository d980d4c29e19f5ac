"""The detector: a checkpoint that ``AutoModelForImageClassification`` loads, calibrated by its card, in batches, as a
replica.

In: the uint8 views of a picture that the checkpoint asks for. Out: the calibrated probability that the picture is
AI-made, one of three answers, and on request a heat map of what moved it; for whoever watches for drift, what the last
layer was given, projected as the checkpoint's reference says. Knows no HTTP and no file formats.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from deployments.checkpoints import Checkpoint, CheckpointError, Thresholds
from deployments.detector_model import ClipBlocksConfig
from deployments.drift_statistic import Reference, read_reference
from deployments.engines import Engine, EngineEntry, last_layer, open_engine, pytorch_engine
from deployments.pixels import Normalisation, check_views
from deployments.replica import DeadlineExceeded, NotFinite, Replica, alive
from deployments.views import ViewSpec

Verdict = Literal["ai", "human", "uncertain"]

#: A probability that moves by more has become another: what an exported file may differ by (``train.export``).
_TOLERANCE = 0.02


def verdict(ai_probability: float, thresholds: Thresholds) -> Verdict:
    """One of three answers: between the two thresholds the detector does not know."""
    if ai_probability >= thresholds.ai_above:
        return "ai"
    return "human" if ai_probability < thresholds.human_below else "uncertain"


@contextlib.contextmanager
def reading(layer: torch.nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """A list of what the layer is given meanwhile, on this thread."""
    read: list[torch.Tensor] = []
    if layer is None:
        yield read
        return
    own = threading.get_ident()  # another thread may be computing another part of a batch

    def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == own:
            read.append(given[0])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield read
    finally:
        handle.remove()


class DetectorModel:
    """A detector loaded for inference.

    Args:
        engine: use the fastest engine that the card admits for this device; without one PyTorch, in bfloat16 on a GPU
            and in float32 elsewhere. Heat maps are PyTorch's in any case.
        precision: PyTorch's, in place of that.
        positive: the label whose probability is asked for; what is served tells `ai` from the rest, evaluation asks a
            classifier of sources for `platform`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: bool = True,
        positive: str = "ai",
        precision: torch.dtype | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        card = checkpoint.card
        self.views = ViewSpec.from_processor(checkpoint.folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._normalise = Normalisation.from_processor(checkpoint.folder)
        dtype = precision or (torch.bfloat16 if self.device == "cuda" else torch.float32)
        # in float32, and converted afterwards: loading sets the default type of the whole process, in which another
        # revision may be computing
        self._model = AutoModelForImageClassification.from_pretrained(  # nosec B615 # a folder on disk
            checkpoint.folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        self._model.to(self.device, dtype).eval()
        labels = card.labels or [name for _, name in sorted(self._model.config.id2label.items())]
        names = [label.lower() for label in labels]
        if positive not in names:
            what = "a detector" if positive == "ai" else f"a classifier that knows {positive}"
            raise CheckpointError(f"{checkpoint.uri}: none of its labels {labels} is `{positive}`: not {what}")
        self._ai = names.index(positive)
        self.last_layer = last_layer(self._model, len(names))
        self.reference: Reference | None = read_reference(checkpoint.folder)
        self.engine = open_engine(checkpoint, self.device, self._as_admitted) if engine else None
        self.in_parts = self.device == "cpu" and self.engine is None  # an engine has threads of its own

    def _as_admitted(self, entry: EngineEntry) -> Engine:
        return self.by_pytorch(entry.precision, entry.compiled)

    def by_pytorch(self, precision: str, compiled: bool) -> Engine:
        """PyTorch as an engine of this network."""
        example = self.normalised(np.zeros((2, *self.views.shape), dtype=np.uint8))
        return pytorch_engine(self._model, self.last_layer, precision, self.device, compiled, example)

    @property
    def network(self) -> Any:
        """The network as PyTorch has it."""
        return self._model

    def pixels(self, views: np.ndarray) -> torch.Tensor:
        """What the network reads of uint8 views: normalised, without the axis of views where there is one only."""
        return self._float_pixels(views).to(self.device, self._model.dtype)

    def normalised(self, views: np.ndarray) -> np.ndarray:
        """The same as an engine reads it: float32, contiguous, in the machine's memory."""
        return np.ascontiguousarray(self._float_pixels(views).numpy())

    def _float_pixels(self, views: np.ndarray) -> torch.Tensor:
        check_views(views, (len(views), *self.views.shape))
        pixels = self._normalise(views)
        return pixels if len(self.views.views) > 1 else pixels[:, 0]

    @torch.inference_mode()
    def logits(self, views: np.ndarray) -> np.ndarray:
        """Uncalibrated logits, float32 ``(n, labels)``, of uint8 views ``(n, V, S, S, 3)``."""
        if self.engine is not None:
            return self.engine[1](self.normalised(views))
        return self._model(pixel_values=self.pixels(views)).logits.float().cpu().numpy()

    @torch.inference_mode()
    def outputs(self, views: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As ``logits``, and what the last layer was given, float32 ``(n, D)``, where that can be had."""
        if self.engine is not None:
            return self.engine[1].outputs(self.normalised(views))
        with reading(self.last_layer) as read:
            logits = self._model(pixel_values=self.pixels(views)).logits.float().cpu().numpy()
        return logits, read[0].flatten(1).float().cpu().numpy() if read else None

    def margins(self, logits: np.ndarray) -> np.ndarray:
        """By how much the calibrated logit of `ai` is above the others' largest, ``(n,)``."""
        others = np.delete(logits, self._ai, axis=1).max(axis=1)
        return (logits[:, self._ai] - others) / self.checkpoint.card.temperature

    def observed(self, logits: np.ndarray, embeddings: np.ndarray | None) -> list[np.ndarray | None]:
        """For each picture its projected embedding and its margin, float32 ``(dimensions + 1,)``; None without a
        reference to compare it with."""
        if self.reference is None or embeddings is None:
            return [None] * len(logits)
        return list(np.column_stack([self.reference.projection(embeddings), self.margins(logits)]).astype(np.float32))

    def detect(self, views: np.ndarray) -> np.ndarray:
        """Calibrated probability of `ai`, float ``(n,)``: softmax of the logits over the card's temperature.

        Raises:
            ViewMismatch: other views than the checkpoint's.
        """
        return self.calibrated(self.logits(views))

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Probability of `ai`, float ``(n,)``, of logits ``(n, labels)``."""
        scaled = logits / self.checkpoint.card.temperature
        exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return exponent[:, self._ai] / exponent.sum(axis=1)

    def explain(self, views: np.ndarray) -> np.ndarray:
        """Grad-CAM of the `ai` logit for one picture: float ``(V, rows, columns)`` in 0..1, one map a view.

        Gradient times activation of the patch tokens, positive evidence only (Selvaraju et al. 2017, applied to
        tokens), scaled by the largest value over all views. The tokens are those of every block that our own detector
        reads, and of the last but one layer of a plain transformer, where the class token still looks at them.

        Raises:
            ViewMismatch: other views than the checkpoint's.
            NotFinite: not all of it is numbers.
        """
        with torch.enable_grad():
            answer = self._model(pixel_values=self.pixels(views[None]), output_hidden_states=True)
            own = isinstance(self._model.config, ClipBlocksConfig)
            states = answer.hidden_states if own else answer.hidden_states[-2:-1]
            gradients = torch.autograd.grad(answer.logits[0, self._ai], states)
        relevance = sum(
            (gradient * state).detach().float().sum(-1).relu()
            for gradient, state in zip(gradients, states, strict=True)
        )
        side = int(relevance.shape[1] ** 0.5)
        maps = relevance[:, -side * side :].reshape(-1, side, side).cpu().numpy()
        if not np.isfinite(maps).all():
            raise NotFinite("the heat map is no picture: not all of its values are numbers")
        return maps / maps.max() if maps.max() > 0 else maps


class Detector(Replica[DetectorModel]):
    """A replica of the detector."""

    stage = "detector"

    def load(self, checkpoint: Checkpoint) -> DetectorModel:
        return DetectorModel(checkpoint)

    def answer(self, model: DetectorModel, views: np.ndarray) -> list[dict[str, Any] | NotFinite]:
        thresholds = model.checkpoint.card.thresholds
        logits, embeddings = model.outputs(views)
        sound = np.isfinite(logits).all(axis=1)
        with np.errstate(invalid="ignore"):  # what is no number is looked at here
            probabilities = map(float, model.calibrated(logits))
        return [
            {
                "label": verdict(probability, thresholds),
                "ai_probability": round(probability, 4),
                "model": model.checkpoint.name,
                "observed": observed,
            }
            if is_sound
            else NotFinite("the detector's answer is no number")
            for is_sound, probability, observed in zip(
                sound, probabilities, model.observed(logits, embeddings), strict=True
            )
        ]

    def difference(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        was, is_now = before["ai_probability"], now["ai_probability"]
        if abs(is_now - was) <= _TOLERANCE:
            return ""
        return f"the known picture is AI-made with a probability of {is_now}, and was with {was}"

    async def drift_reference(self, known: str = "") -> tuple[str, bytes | None]:
        """The revision in service, and its reference for drift as in its file; None: it has none, or is the ``known``
        one."""
        model = self.model
        revision, reference = model.checkpoint.revision, model.reference
        return revision, None if reference is None or revision == known else reference.to_bytes()

    async def detect(self, views: np.ndarray, spec: ViewSpec, deadline: float) -> dict[str, Any]:
        """One picture's views ``(V, S, S, 3)``, made by ``spec`` -> ``{"label", "ai_probability", "model"}``, and for
        whoever watches for drift ``observed`` (``DetectorModel.observed``).

        Raises: as ``Replica.batched``.
        """
        return await self.batched(views, spec, deadline)

    async def explain(self, views: np.ndarray, spec: ViewSpec, deadline: float) -> list[list[list[float]]]:
        """Heat map of one picture for each of its views, rows of values in 0..1.

        Raises: as ``detect``.
        """
        self.check(views, spec)
        if not alive([deadline]):
            raise DeadlineExceeded("the detector had no time left for a heat map")
        try:
            return np.round(await self.compute(self.model.explain, views), 3).tolist()
        except NotFinite as error:
            self._health.spoilt(str(error))
            raise
