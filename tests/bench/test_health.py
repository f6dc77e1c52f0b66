"""Health flags: each is raised by a network made to deserve it, by no other, and leads to a section of the docs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.health import Flag, flags
from bench.health import collapsed as collapsed_warnings
from bench.models import PLAIN, build_model

DOCS = Path(__file__).resolve().parents[2] / "docs" / "health_flags.md"
DRAW = torch.Generator().manual_seed(5)
X, Y = torch.rand(300, 1, 8, 8, generator=DRAW), torch.arange(300) % 10


class After(nn.Module):
    """A network followed by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.net, self.change, self.dropout = build_model("mlp", (1, 8, 8), 10), change, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.net(self.dropout(x)))


class Stepped(nn.Module):
    """A network that sees pixels rounded, so that its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model("mlp", (1, 8, 8), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 8).round() / 8)


class Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.flatten(1)[:, :10]


def collapsed() -> nn.Module:
    model = build_model("mlp", (1, 8, 8), 10)
    with torch.no_grad():
        model.get_submodule("fc2").weight.zero_()
    return model


def broken() -> nn.Module:
    return After(lambda z: torch.where(z > z.mean(), z, torch.inf))


def names(found: list[Flag]) -> list[str]:
    return [flag.name for flag in found]


@pytest.mark.parametrize("arch", PLAIN)
def test_a_plain_network_in_eval_mode_raises_no_flag(arch: str) -> None:
    x = torch.rand(40, 1, 16, 16, generator=DRAW)
    assert flags(build_model(arch, (1, 16, 16), 10).eval(), x, Y[:40]) == []


RAISED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "noise": (lambda: After(lambda z: z + 0.01 * torch.randn_like(z)).eval(), ["random outputs"]),
    "dropout": (lambda: After(lambda z: z, 0.5).train(), ["train-mode layers", "random outputs"]),
    "softmax": (lambda: After(lambda z: z.softmax(1)).eval(), ["softmax outputs"]),
    "rounding": (lambda: Stepped().eval(), ["zero input gradients"]),
    "no_grad": (lambda: Blind().eval(), ["zero input gradients"]),
    "collapsed": (lambda: collapsed().eval(), ["constant network", "zero input gradients"]),
    "infinite": (lambda: broken().eval(), ["non-finite outputs"]),
}


@pytest.mark.parametrize("name", RAISED)
def test_a_network_with_one_fault_raises_the_flags_of_that_fault_alone(name: str) -> None:
    make, expected = RAISED[name]
    assert names(flags(make(), X, Y)) == expected


def test_a_record_is_warned_of_a_collapsed_network_and_told_when_no_image_can_change_it() -> None:
    """Pruned to nothing, the weights say so; a ReLU that no image of the data passes leaves open what others would do."""
    assert collapsed_warnings(build_model("mlp", (1, 8, 8), 10).eval(), X) == []
    (cut,) = collapsed_warnings(collapsed().eval(), X)
    assert cut.endswith("the network has collapsed; no path of non-zero weights leads from a pixel to a logit")
    model = build_model("mlp", (1, 8, 8), 10)
    with torch.no_grad():
        model.get_submodule("fc1").bias.fill_(-1e3)
    (dead,) = collapsed_warnings(model.eval(), X)
    assert (dead.startswith("256 images get the same logits"), dead.endswith("the network has collapsed")) == (True, True)


def test_a_saturated_softmax_has_no_gradient_and_the_share_of_images_is_exact() -> None:
    model, x = build_model("mlp", (1, 8, 8), 10).eval(), X[:200]
    y = model(x).argmax(1)
    model = nn.Sequential(model, nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(1e6 * torch.eye(10))
        y[:10] = (y[:10] + 1) % 10  # a wrong label has a gradient however sure the network is
    (flag,) = flags(model.eval(), x, y)
    assert flag.name == "zero input gradients"
    assert "at 190 of 200 images (95.0 %)" in flag.sentence


@pytest.mark.parametrize("change, bounds", [(lambda x: x * 255, r"\[0\.0\d*, 25\d"), (lambda x: x - 0.5, r"\[-0\.[45]")])
def test_pixels_outside_the_unit_interval_are_named_with_their_range(change: Callable[[Tensor], Tensor], bounds: str) -> None:
    (flag,) = flags(build_model("mlp", (1, 8, 8), 10).eval(), change(X), Y)
    assert flag.name == "inputs outside the unit interval"
    assert re.search(bounds, flag.sentence)


def test_one_pixel_of_one_image_that_is_outside_or_no_number_is_seen() -> None:
    for value in (1.0001, -1e-6, float("nan")):
        x = X.clone()
        x[1, 0, 3, 3] = value
        found = flags(build_model("mlp", (1, 8, 8), 10).eval(), x, Y)
        assert names(found)[0] == "inputs outside the unit interval"


def test_a_batchnorm_in_train_mode_is_flagged_and_learns_nothing_from_it() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (flag,) = flags(model, X, Y)
    assert flag.name == "train-mode layers"
    assert flag.sentence.startswith("1 would")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert flags(model.eval(), X, Y) == []


def test_looking_at_a_random_network_leaves_the_random_numbers_of_the_program_alone() -> None:
    model = RAISED["noise"][0]()
    state = torch.random.get_rng_state()
    assert names(flags(model, X, Y)) == ["random outputs"]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("model, y, complaint", [
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), Y, "not all of the network's 5 classes"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Y - 1, "labels -1 to 8"),
    (nn.Conv2d(1, 10, 1), Y, "rows of at least 2 logits"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), Y, "rows of at least 2 logits"),
])  # fmt: skip
def test_outputs_and_labels_that_are_no_classification_are_refused(model: nn.Module, y: Tensor, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        flags(model.eval(), X, y)
    with pytest.raises(UserError, match="no images"):
        flags(model.eval(), X[:0], y[:0])


def test_every_flag_has_a_section_in_the_docs_and_every_section_a_flag() -> None:
    headings = re.findall(r"^## (.+)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    raised = {name for _, expected in RAISED.values() for name in expected} | {"inputs outside the unit interval"}
    assert {heading.lower() for heading in headings} == raised
    for make, _ in RAISED.values():
        for flag in flags(make(), X, Y):
            page, _, anchor = flag.page.partition("#")
            assert page == "docs/health_flags.md"
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
