"""What the Lightning modules have in common: schedule, layers' rates, averages, unreached parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deployments.pixels import Normalisation
from train.module import Optimisation, TrainedModule, parameter_groups


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Linear(4, 4)
        self.layer = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.unused = nn.Linear(2, 2)
        self.classifier = nn.Linear(4, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.embeddings(values)
        for layer in self.layer:
            values = layer(values)
        return self.classifier(values)


class ToyModule(TrainedModule):
    metric = "val_x"

    def prepare(self, batch: Any) -> Any:
        return batch

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(batch["x"]).square().mean()

    def judge(self, model: nn.Module, batch: Any) -> list[Any]:
        return []

    def score(self, judged: Any) -> dict[str, float]:
        return {}


def module(**changes: object) -> ToyModule:
    config = Optimisation.model_validate({"learning_rate": 1.0, **changes})
    return ToyModule(Toy(), Normalisation((0.5,) * 3, (0.5,) * 3), config, 100)


def test_the_rate_rises_and_then_falls_to_its_end() -> None:
    toy = module(warmup=0.1, final_rate=0.05)
    rates = [toy.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1) and rates[100] == pytest.approx(0.05)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_each_layer_has_a_rate_of_its_own_and_only_matrices_decay() -> None:
    toy = module(layer_decay=0.5)
    groups = parameter_groups(toy.named_trained(), toy.config)
    rate_of = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    model: Any = toy.model
    assert rate_of[id(model.classifier.weight)] == (1.0, 0.05)
    assert rate_of[id(model.layer[1].weight)][0] == 0.5
    assert rate_of[id(model.layer[0].weight)][0] == 0.25
    assert rate_of[id(model.embeddings.weight)][0] == 0.125
    assert rate_of[id(model.classifier.bias)] == (1.0, 0.0)
    assert len(rate_of) == len(list(model.parameters()))
    assert {group["lr"] for group in parameter_groups(toy.named_trained(), module().config)} == {1.0}


def test_parameters_that_the_loss_does_not_reach_are_not_trained() -> None:
    toy = module()
    toy.freeze_unreached({"x": torch.ones(1, 4)})
    names = {name for name, _ in toy.named_trained()}
    assert not any("unused" in name for name in names) and len(names) == 8
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_the_average_is_what_is_judged() -> None:
    toy = module(ema=0.5)
    toy.freeze_unreached({"x": torch.ones(1, 4)})
    toy.average.update_parameters(toy.model)
    before = toy.model.classifier.weight.detach().clone()  # type: ignore[union-attr]
    with torch.no_grad():
        toy.model.classifier.weight += 1  # type: ignore[union-attr, operator]
    toy.average.update_parameters(toy.model)
    judged: Any = toy.plain()
    assert torch.allclose(judged.classifier.weight, before + 0.5)


def test_numbers_of_positions_are_not_averaged() -> None:
    toy = module(ema=0.9999)
    toy.model.register_buffer("positions", torch.arange(197), persistent=False)
    toy.freeze_unreached({"x": torch.ones(1, 4)})
    for _ in range(3):
        toy.average.update_parameters(toy.model)
    judged: Any = toy.plain()
    assert torch.equal(judged.positions, torch.arange(197))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_blend_with_the_start_is_what_is_judged(ema: float) -> None:
    toy = module(blend=0.25, ema=ema)
    toy.freeze_unreached({"x": torch.ones(1, 4)})
    before = toy.model.classifier.weight.detach().clone()  # type: ignore[union-attr]
    for step in (1, 2):
        if ema:
            toy.average.update_parameters(toy.model)  # the first is taken as it is
        with torch.no_grad():
            toy.model.classifier.weight += step  # type: ignore[union-attr, operator]
    if ema:
        toy.average.update_parameters(toy.model)
    judged: Any = toy.plain()
    trained = 1.75 if ema else 3.0
    assert torch.allclose(judged.classifier.weight, before + 0.25 * trained)
    assert not any("_shadow" in name for name in toy.state_dict())
    again: Any = toy.plain()
    assert again is judged and torch.allclose(again.classifier.weight, before + 0.25 * trained)


def test_pixels_are_normalised_and_a_single_view_loses_its_axis() -> None:
    toy = module()
    views = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 1, 4, 4, 3)
    pixels = toy.pixels(views)
    assert pixels.shape == (2, 3, 4, 4)
    assert torch.allclose(pixels[0], torch.tensor(-1.0)) and torch.allclose(pixels[1], torch.tensor(1.0))
    assert toy.pixels(views.expand(2, 3, 4, 4, 3)).shape == (2, 3, 3, 4, 4)
