"""What goes with a run's steps: losses, the clock, the best weights so far, and checkpoints of whole steps.

What a checkpoint's folder holds is told in ``train.loop``. Knows no task, and of Ray nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file

from train.gauges import Gauges
from train.giving_way import GiveWay
from train.job import LoopConfig
from train.module import NonFinite, TrainedModule
from train.tracking import Run

#: Losses are compared and the clock is looked at about this often.
_SYNC_S, _MOST_STEPS_BETWEEN = 2.0, 50
#: Why a run ends before its last step, to go on from there: its time is over, or serving wants what it holds.
ENDS = ("", "time", "way")

#: Takes figures, a checkpoint's folder (None on other workers than the first), and whether to wait until it is kept.
Report = Callable[[dict[str, Any], Path | None, bool], None]


class Watch(pl.Callback):
    """Losses, clock, best weights and checkpoints of a run.

    Args:
        scratch: a folder of this process.
        deadline: ``time.time()`` at which to stop.
        report: hands a checkpoint to whoever keeps them; None keeps none.
        run: the MLflow run, on the first worker.
        gauges: what operators see, on the first worker.
        give_way: whether serving wants what the run holds, on the first worker.
        loaded: told when nothing of the checkpoint that the run goes on from is read any more.
    """

    def __init__(
        self,
        config: LoopConfig,
        steps_per_epoch: int,
        scratch: Path,
        deadline: float = float("inf"),
        report: Report | None = None,
        run: Run | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        gauges: Gauges | None = None,
        give_way: GiveWay | None = None,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.loaded = loaded
        self.gauges, self.give_way = gauges, give_way
        self.config, self.steps_per_epoch, self.scratch = config, steps_per_epoch, scratch
        self.deadline, self.report, self.run, self.say = deadline, report, run, say
        self.best, self.bad, self.best_metrics = -float("inf"), 0, dict[str, float]()
        self.validations = 0
        self.losses: list[tuple[int, float]] = []
        self.stopped = ""
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._parts: list[torch.Tensor] = []
        self.step, self._saved, self._due, self._interval = 0, 0, False, 1
        self._said = self._paused = 0.0
        self._epoch: dict[str, Any] = {}
        self.began, self.ended, self.began_step = 0.0, 0.0, 0

    # ------------------------------------------------------------------------------------------------- every step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.loaded()
        self.step = self._saved = self.began_step = trainer.global_step
        self.began = self._synced = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._due:
            self._save(trainer, module)
        self._epoch = copy.deepcopy(trainer.fit_loop.epoch_progress.state_dict())

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._parts.append(outputs["loss"].detach().float())
        if trainer.global_step == self.step:
            return  # a part of a step
        self.step = trainer.global_step
        if not self.losses and not self._pending:
            # the first step waits for loaders and allocates: speed is that of the others
            self.began, self.began_step = time.monotonic(), self.step
        self.ended = time.monotonic()
        self._pending.append((self.step, torch.stack(self._parts).sum()))  # Lightning has divided each part
        self._parts = []
        if len(self._pending) >= self._interval or self.step == trainer.max_steps:
            self._sync(trainer, module)
        if self.step % self.config.checkpoint_every == 0:
            self._due = True
        if self.step == trainer.max_steps:
            trainer.val_check_batch = 1  # whatever its interval, a run ends with a validation

    def _sync(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Mean losses over the workers, and the first worker's clock: all of them stop at the same step."""
        if not self._pending:
            return
        now = time.monotonic()
        each = (now - self._synced) / len(self._pending)
        self._synced = now
        interval = int(np.clip(_SYNC_S / max(each, 1e-6), 1, _MOST_STEPS_BETWEEN))
        first = trainer.is_global_zero
        shared = torch.stack(
            [value for _, value in self._pending]
            + [
                torch.tensor(value, device=module.device)
                for value in (float(first and self._ends()), float(first and interval))
            ]
        )
        world = trainer.world_size
        if world > 1:
            torch.distributed.all_reduce(shared)
        values = shared.tolist()
        steps, self._pending = [step for step, _ in self._pending], []
        self._interval = max(1, int(values[-1]))
        means = [value / world for value in values[:-2]]
        for step, mean in zip(steps, means, strict=True):
            self.losses.append((step, mean))
            if not np.isfinite(mean):
                raise NonFinite(
                    f"the loss is {mean} at step {step}: lower --learning-rate (now "
                    f"{self.config.learning_rate:g}), raise "
                    "--warmup, keep --gradient-clip above 0, or use --precision bf16-mixed instead of 16-mixed"
                )
        # after the last step there is nothing to go on with: the run ends as it would have
        if values[-2] and not trainer.should_stop and steps[-1] < trainer.max_steps:
            self.stopped = ENDS[int(values[-2])]
            trainer.should_stop = True
            if steps[-1] % (self.config.validate_every or self.steps_per_epoch):
                trainer.limit_val_batches = 0  # Lightning would validate before it stops
        if first:
            self._tell(trainer, steps, means)

    def _ends(self) -> int:
        """Which of ``ENDS`` has come, by the first worker's clock and what it has been told."""
        if time.time() > self.deadline:
            return ENDS.index("time")
        return ENDS.index("way") if self.give_way is not None and self.give_way.to else 0

    def _tell(self, trainer: pl.Trainer, steps: list[int], means: list[float]) -> None:
        step, total = steps[-1], int(trainer.max_steps)
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        speed = (step - self.began_step) / max(1e-9, self.ended - self.began)
        if self.gauges is not None:
            self.gauges.tell(step, means[-1], speed * self.config.batch_size)
        if self.run is not None:
            for each, mean in zip(steps, means, strict=True):
                if each % 10 == 0 or each in (1, total):
                    epoch = each / self.steps_per_epoch
                    self.run.metrics({"train_loss": mean, "learning_rate": rate, "epoch": epoch}, each)
            if speed:
                self.run.metrics({"samples_per_s": speed * self.config.batch_size}, step)
        if time.monotonic() - self._said > 10 or step == total or not self._said:
            self._said = time.monotonic()
            pace = f", {speed * self.config.batch_size:.1f} pictures/s" if speed else ""
            left = f", {(total - step) / speed / 60:.0f} min left" if speed else ""
            self.say(
                f"step {step}/{total}, epoch {step / self.steps_per_epoch:.2f}, loss {means[-1]:.4f}, rate {rate:.2e}"
                f"{pace}{left}"
            )

    # -------------------------------------------------------------------------------------------------- validation

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sync(trainer, module)
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainedModule)
        value = module.results[module.metric]
        self.validations += 1
        self.bad = 0 if value > self.best else self.bad + 1
        if value > self.best:
            self.best, self.best_metrics = value, dict(module.results)
            if trainer.is_global_zero:
                assert module._judge is not None
                save_weights(module._judge, self.scratch / "best.safetensors")
                (self.scratch / "judged.json").write_text(json.dumps(list(module.judged.items())))
        self._due = True
        if self._is_out_of_patience():
            self.stopped = "patience"
            trainer.should_stop = True
        if trainer.is_global_zero:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in module.results.items())
            self.say(f"step {self.step}: {figures}{'' if self.bad else ' (best so far)'}")
            if self.run is not None:
                self.run.metrics(module.results, self.step)
        # speed is that of training
        self._synced = time.monotonic()
        self.began += self._synced - self._paused
        self.ended += self._synced - self._paused

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sync(trainer, module)
        if self.step > self._saved or self._due:
            self._save(trainer, module, between=False)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, between: bool = True) -> None:
        """A checkpoint of whole steps. Before a batch starts, Lightning counts it as begun already."""
        self._sync(trainer, module)
        self._due, self._saved = False, self.step
        if self.report is None:
            return
        # not in the scratch folder: whatever ends the run, this may still be on its way to where checkpoints are kept
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.scratch.parent))
        loop = trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
        kept = copy.deepcopy(epochs.state_dict())
        if between:
            batches.total.ready -= 1
            batches.current.ready -= 1
        else:
            epochs.load_state_dict(self._epoch)  # the one long pass is not over
        trainer.save_checkpoint(folder / "last.ckpt")
        epochs.load_state_dict(kept)
        if between:
            batches.total.ready += 1
            batches.current.ready += 1
        if trainer.is_global_zero:
            for name in ("best.safetensors", "judged.json"):
                if (self.scratch / name).is_file():
                    shutil.copy(self.scratch / name, folder / name)
            (folder / "progress.json").write_text(json.dumps(self.progress()))
        if not trainer.is_global_zero:
            shutil.rmtree(folder)
        self.report(self.progress(), folder if trainer.is_global_zero else None, not between)

    def progress(self) -> dict[str, Any]:
        """Where the run stands."""
        return {
            "step": self.step,
            "best": self.best,
            "bad": self.bad,
            "validations": self.validations,
            **self.best_metrics,
        }

    def restore(self, folder: Path, first: bool = True) -> int:
        """Go on from a checkpoint's counts and, on the first worker, its best weights; returns the step that it was
        taken after."""
        progress = json.loads((folder / "progress.json").read_text())
        self.step = self.began_step = int(progress.pop("step"))
        self.best, self.bad = progress.pop("best"), progress.pop("bad")
        self.validations = progress.pop("validations", 0)  # runs of earlier releases did not count them
        self.best_metrics = progress
        for name in ("best.safetensors", "judged.json"):
            if first and (folder / name).is_file():
                shutil.copy(folder / name, self.scratch / name)
        if self._is_out_of_patience():
            self.stopped = "patience"
        return self.step

    def _is_out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.bad


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """A model's weights, tied ones once."""
    seen: dict[int, str] = {}
    weights = {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or not value.numel():
            seen[value.data_ptr()] = name
            weights[name] = value.detach().cpu().contiguous()
    partial = path.with_suffix(".part")
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(path)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """What ``save_weights`` wrote; tied weights come along."""
    model.load_state_dict(load_file(path), strict=False)
