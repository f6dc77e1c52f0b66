"""Every architecture, at a tiny width, through every verifier, the pruning methods and a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.checkpoints import Card, guess_arch, network, read, save_checkpoint
from bench.methods import HYDRA, LWM
from bench.models import ARCHITECTURES, PLAIN, build_model
from bench.sparsity import effective_state, kept_of, prunable
from bench.train import Training
from tests.verifiers.small_nets import exact, images, labels, lowest_attacked, lowest_sampled
from verifiers import VERIFIERS, UnsupportedNetworkError
from verifiers.ball import Interval
from verifiers.bounds import ibp_margins

EPS = Fraction(1, 500)
CLASSES = 3
DOCS = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

# what a verifier has no rule for, as the page says it; where nothing stands, it answers
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "mixtrain"): "MaxPool2d" for name in ("googlenet", "resnet50_imagenet")},
    **{("googlenet", name): "MaxPool2d" for name in ("crown-ibp", "crown", "alpha-crown", "exact")},
}
QUICK = {
    "crown-ibp": {*PLAIN, "wrn_16_8", "googlenet"},
    "crown": {*PLAIN, "googlenet"},
    "alpha-crown": {"googlenet"},
    "exact": {*PLAIN, "wrn_16_8", "googlenet"},
    "mixtrain": {*PLAIN, "wrn_16_8", "googlenet"},
}
PAIRS = [
    pytest.param(arch, name, marks=[] if arch in QUICK.get(name, ARCHITECTURES) else pytest.mark.slow)
    for arch in ARCHITECTURES
    for name in VERIFIERS
]


def shape_of(arch: str, smallest: int = 8) -> tuple[int, int, int]:
    side = {"lenet": 16, "vgg16": 32, "resnet50_imagenet": 2 * smallest}.get(arch, smallest)
    return 1, side, side


def tiny(arch: str, shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """The architecture at 1/64 of its width in eval mode, with BatchNorm statistics of random images."""
    model = build_model(f"{arch}@1/64", shape, CLASSES, (0.4,), (0.5,), seed=seed)
    with torch.no_grad():
        for batch in range(3):
            model(images(16, shape, seed=batch))
    return model.eval()


@pytest.fixture(scope="module")
def case() -> Callable[..., tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """case(arch): network, images, their labels and the smallest margins that 200 points of the ball and PGD reach."""
    known: dict[tuple[str, bool], tuple[nn.Module, Tensor, Tensor, Tensor]] = {}

    def make(arch: str, dear: bool = False) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """dear: one image of half the side."""
        if (arch, dear) not in known:
            shape = shape_of(arch, 4 if dear else 8)
            model, x = tiny(arch, shape), images(1 if dear else 2, shape, seed=7)
            y = labels(model, x)
            sampled = lowest_sampled(model, x, y, "linf", EPS, count=200)
            known[arch, dear] = model, x, y, torch.minimum(sampled, lowest_attacked(model, x, y, "linf", EPS))
        return known[arch, dear]

    return make


@pytest.mark.parametrize("arch, name", PAIRS)
def test_a_verifier_answers_below_every_margin_reached_or_names_the_operation(case: Any, arch: str, name: str) -> None:
    model, x, y, reached = case(arch, dear=name in ("crown", "alpha-crown"))
    if name == "smoothing":
        proof = VERIFIERS[name](sigma=0.1, n0=10, n=30)(model, x, y)
        assert torch.isfinite(proof.radius).all()
        return
    verifier = VERIFIERS[name](eps=EPS, nodes=8) if name == "exact" else VERIFIERS[name](eps=EPS)
    if (arch, name) in REFUSED:
        with pytest.raises(UnsupportedNetworkError, match=rf"\b{REFUSED[arch, name]}\b"):
            verifier(model, x, y)
        return
    proof = verifier(model, x, y)
    known = ~torch.isnan(proof.margin)
    assert known.all() or name == "exact"
    assert (proof.margin[known].double() <= reached[known] + 1e-5).all()
    assert not (torch.as_tensor(proof.radius) > 0)[reached <= 0].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_interval_bounds_of_a_single_point_are_the_networks_own_margins(case: Any, arch: str) -> None:
    model, x, y, _ = case(arch)
    z, net = x.double(), exact(model)
    logits = net(z)
    torch.testing.assert_close(ibp_margins(net, Interval(z, z), y), logits.gather(1, y[:, None]) - logits)


def test_the_page_lists_exactly_what_is_refused_here() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    listed = {(arch, name): kind for name, kind, archs in rows for arch in re.findall(r"`(\w+)`", archs)}
    assert listed == REFUSED


# ---- pruning and checkpoints -----------------------------------------------------------------------------------------


def masked(model: nn.Module, method: Any, training: Training, density: Fraction) -> Iterator[Any]:
    """The method's phases up to the last, none of them trained; the generator must live as long as the masks are read."""
    phases = method(model, density, training)
    for _ in range(2 if isinstance(method, LWM) else 3):
        next(phases)
    return phases


@pytest.mark.parametrize("method", [LWM(), HYDRA()], ids=["lwm", "hydra"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pruned_weights_keep_their_count_in_every_layer_through_a_checkpoint(
    training_of: Callable[..., Training], tmp_path: Path, arch: str, method: Any
) -> None:
    model, density, path = tiny(arch, shape_of(arch), seed=1), Fraction(1, 10), tmp_path / "net.safetensors"
    phases = masked(model, method, training_of(), density)
    x, name = images(3, shape_of(arch)), f"{arch}@1/64"
    with torch.no_grad():
        wanted = model.eval()(x)
    save_checkpoint(path, effective_state(model), Card(name, shape_of(arch), CLASSES, "toy", (0.4,), (0.5,)))
    phases.close()
    loaded = read(path)
    assert loaded.card is not None
    assert loaded.card.arch == name
    plain = network(loaded.state, loaded.card, path)
    torch.testing.assert_close(plain(x), wanted)
    counts = [(int((layer.weight != 0).sum()), layer.weight.numel()) for layer in prunable(plain).values()]
    assert [kept for kept, _ in counts] == [kept_of(size, density) for _, size in counts]


@pytest.mark.parametrize("arch", ["resnet50", "resnet50_imagenet", "wrn_28_4", "vgg16"])
def test_a_bare_state_dict_tells_its_architecture(arch: str) -> None:
    with torch.device("meta"):
        state = build_model(arch, (3, 32, 32), 10).state_dict()
    assert guess_arch(state, (3, 32, 32), 10) == arch
