"""The complete verifier: its verdicts are the truth on tiny networks, its witnesses re-run, its limits hold."""

from __future__ import annotations

import copy
import itertools
import time
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from attacks import PGD
from bench.data import load
from bench.models import build_model
from bench.threat import within
from tests.verifiers.brute_force import true_margin
from tests.verifiers.small_nets import RULE_NETS, Forward, exact, images, labels, linear, lowest_reached, margins_at, randomised
from verifiers import Crown, Exact, UnsupportedNetworkError
from verifiers.ball import Interval, outward_box
from verifiers.bounds import difference_rows
from verifiers.witness import inward_box

TOY = lambda: nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU())  # noqa: E731
SHAPES: dict[str, tuple[int, ...]] = {"mlp": (3,), "cnn": (1, 2, 3)}
NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, (1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3)
    ),
}
BRANCHING = {"milp_below": 0}


def same(a: Any, b: Any) -> bool:
    pairs = (a.witness.nan_to_num(-1), b.witness.nan_to_num(-1)), (a.margin, b.margin), (a.details["nodes"], b.details["nodes"])
    return a.status == b.status and all(torch.equal(*pair) for pair in pairs)


def compare_with_the_truth(name: str, seed: int) -> list[str]:
    """Verdicts of one random network at three radii, each held against the enumeration of all activation patterns."""
    net = randomised(NETS[name](), seed=seed)
    x = images(1, SHAPES[name], seed)
    y, seen = labels(net, x), []
    for eps in (Fraction(1, 10), Fraction(1, 4), Fraction(1, 2)):
        ball = outward_box(x.double(), eps)
        truth = true_margin(randomised(NETS[name](), seed=seed), ball.lower, ball.upper, int(y), 3)  # type: ignore[arg-type]
        for options in ({}, BRANCHING):
            proof = Exact(eps=eps, **options)(net, x, y)
            if abs(truth) > 1e-3:
                assert proof.status == ("proved" if truth > 0 else "broken",)
            assert proof.margin.item() <= truth + 1e-6 or proof.status == ("broken",)
            assert (proof.radius.item() == float(eps)) == (proof.status == ("proved",))
        seen += proof.status
    return seen


@pytest.mark.parametrize("name", NETS)
def test_verdicts_equal_brute_force_over_all_activation_patterns(name: str) -> None:
    seen = [status for seed in range(4) for status in compare_with_the_truth(name, seed)]
    assert min(seen.count("proved"), seen.count("broken")) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_verdicts_equal_brute_force_over_many_more_networks(name: str) -> None:
    seen = [status for seed in range(100, 200) for status in compare_with_the_truth(name, seed)]
    assert min(seen.count("proved"), seen.count("broken")) >= 50


def test_the_toy_whose_exact_margin_is_0_is_not_certified() -> None:
    """relu(x1 + x2) - relu(x1 - x2) on the clipped ball of (0.6, 0.2): its minimum is 0 at x2 = 0 for eps >= 0.2."""
    x, y = torch.tensor([[0.6, 0.2]]), torch.tensor([0])
    for options in ({}, BRANCHING):
        assert Exact(eps=Fraction(3, 10), **options)(TOY(), x, y).status == ("open",)
        proof = Exact(eps=Fraction(19, 100), **options)(TOY(), x, y)
        assert proof.status == ("proved",)
        assert 0 < proof.margin.item() <= 0.02 + 1e-6  # 2 * (0.2 - 0.19)


@pytest.mark.parametrize("seed", range(6))
def test_branching_alone_and_the_integer_programme_agree(seed: int) -> None:
    layers = nn.Conv2d(1, 3, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 12), nn.ReLU(), nn.Linear(12, 3)
    net = randomised(nn.Sequential(*layers), seed=seed)
    x = images(6, (1, 6, 6), seed)
    y, eps = labels(net, x), Fraction(1, 15)
    programme, branching = Exact(eps=eps)(net, x, y), Exact(eps=eps, milp_below=0)(net, x, y)
    assert programme.status == branching.status
    assert set(programme.status) <= {"proved", "broken"}
    reached = lowest_reached(net, x, y, "linf", eps)
    for proof in (programme, branching):
        assert (proof.margin <= reached).all()
        assert (reached[proof.radius > 0] > 0).all()


POOLED = nn.Sequential(nn.Conv2d(1, 4, 2), nn.MaxPool2d((1, 2)), nn.Flatten(), nn.Linear(4, 3))


def least_of_pooled(net: nn.Module, ball: Interval, row: Tensor) -> float:
    """The smallest row of conv - max of pairs - linear over the box: one linear programme per choice of winners."""
    points = torch.cat([torch.zeros(1, 6), torch.eye(6)]).double().view(7, 1, 2, 3)
    values = net[0](points).unflatten(3, (1, 2)).flatten(1, 3).detach().numpy()  # type: ignore[index]
    matrix, constant = values[1:] - values[0], values[0]  # [6, windows, 2], [windows, 2]
    weight = (row @ net[3].weight).detach().numpy()  # type: ignore[index]
    ends, least = list(zip(ball.lower.flatten().tolist(), ball.upper.flatten().tolist())), float("inf")
    for winners in itertools.product((0, 1), repeat=len(constant)):
        rise = [matrix[:, k, 1 - w] - matrix[:, k, w] for k, w in enumerate(winners)]
        most = [constant[k, w] - constant[k, 1 - w] for k, w in enumerate(winners)]
        goal = sum(weight[k] * matrix[:, k, w] for k, w in enumerate(winners))
        found = linprog(goal, A_ub=rise, b_ub=most, bounds=ends)
        if found.status == 0:
            least = min(least, found.fun + sum(weight[k] * constant[k, w] for k, w in enumerate(winners)))
    return least + float((row @ net[3].bias).detach())  # type: ignore[index]


@pytest.mark.parametrize("seed", range(6))
def test_max_pooling_is_decided_as_by_linear_programmes_over_all_winners(seed: int) -> None:
    net, x = exact(randomised(copy.deepcopy(POOLED), seed=seed)), images(1, (1, 2, 3), seed, torch.float64)
    y = labels(net, x)
    for eps in (Fraction(1, 20), Fraction(1, 5), Fraction(1, 2)):
        rows = difference_rows(y, 3, torch.float64)[0]
        truth = min(least_of_pooled(net, outward_box(x, eps), row) for row in rows)
        for options in ({}, BRANCHING):
            proof = Exact(eps=eps, **options)(net, x, y)
            assert abs(truth) <= 1e-3 or proof.status == ("proved" if truth > 0 else "broken",)
            assert proof.margin.item() <= truth + 1e-6 or proof.status == ("broken",)


def test_lenet_is_decided() -> None:
    """Caffe's LeNet, pruned: more than CROWN proves, nothing that an attack reaches."""
    net = randomised(build_model("lenet", (1, 16, 16), 5), gain=1.3, kept=0.1)
    x = images(3, (1, 16, 16))
    y, eps = labels(net, x), Fraction(1, 250)
    proof, reached = Exact(eps=eps, nodes=200)(net, x, y), lowest_reached(net, x, y, "linf", eps)
    assert proof.status.count("proved") > int((Crown(eps=eps)(net, x, y).radius > 0).sum()) or "open" not in proof.status
    assert (reached[proof.radius > 0] > 0).all()
    assert (proof.margin.nan_to_num(-1) <= reached + 1e-9).all()


NAMES = [
    "MaxPool2d", "F.max_pool2d", "MaxPool2d first", "Conv2d grouped", "residual", "torch.cat", "+", "Normalize", "BatchNorm2d",
    "AvgPool2d", "ReLU6", "x.relu",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_graph_gets_sound_answers(name: str) -> None:
    net = randomised(RULE_NETS[name](), gain=1.5)
    x = images(3)
    y = labels(net, x)
    for eps in (Fraction(1, 100), Fraction(1, 20)):
        proof = Exact(eps=eps, nodes=40)(net, x, y)
        reached = lowest_reached(net, x, y, "linf", eps)
        assert (proof.margin <= reached + 1e-9).all()
        assert (reached[proof.radius > 0] > 0).all()
        crown = Crown(eps=eps)(net, x, y)
        assert (proof.radius >= crown.radius).all()


def test_witnesses_lie_in_the_exact_ball_and_are_misclassified_in_float64_and_other_rows_are_nan() -> None:
    net = randomised(RULE_NETS["Conv2d grouped"](), gain=1.5)
    x = images(20)
    y, eps = labels(net, x), Fraction(1, 30)
    proof = Exact(eps=eps, nodes=20)(net, x, y)
    assert proof.witness is not None
    assert proof.witness.dtype == torch.float32
    broken = torch.tensor([status == "broken" for status in proof.status])
    assert 0 < broken.sum() < 20
    assert proof.witness[~broken].isnan().all()
    for witness, image in zip(proof.witness[broken], x[broken]):
        for a, b in zip(witness.flatten().tolist(), image.flatten().tolist()):
            assert abs(Fraction(a) - Fraction(b)) <= eps
            assert 0 <= a <= 1
    assert (margins_at(net, proof.witness[broken], y[broken]) <= 0).all()
    assert (labels(net.double(), proof.witness[broken].double()) != y[broken]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [Fraction(1, 10), Fraction(8, 255), Fraction(1, 10**9), Fraction(0), Fraction(1, 3), Fraction(2)])
def test_the_inward_box_lies_in_the_exact_ball_and_holds_the_image(eps: Fraction, dtype: torch.dtype) -> None:
    x = torch.cat([torch.tensor([0.0, 1.0, 0.1, 1e-30, 1 - 2**-24]), images(1, (200,))[0]]).to(dtype)
    box = inward_box(x, eps)
    assert ((box.lower <= x) & (x <= box.upper)).all()
    for low, high, at in zip(box.lower.tolist(), box.upper.tolist(), x.tolist()):
        assert max(Fraction(at) - eps, Fraction(0)) <= Fraction(low)
        assert Fraction(high) <= min(Fraction(at) + eps, Fraction(1))
    assert (box.upper - box.lower).max() >= min(1, 2 * float(eps)) - 1e-6


Hard = tuple[nn.Module, Tensor, Tensor, Fraction]

# ---- limits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard() -> Hard:
    """A dense network and an image that neither CROWN nor the search decides at this radius."""
    net = randomised(build_model("mlp", (1, 8, 8), 5), gain=1.5, seed=3)
    x = images(12, (1, 8, 8), 3)
    y, eps = labels(net, x), Fraction(1, 45)
    some = Exact(eps=eps, nodes=20, milp_below=0)(net, x, y)
    (at, *_) = [i for i, status in enumerate(some.status) if status == "open"]
    return net, x[at : at + 1], y[at : at + 1], eps


def test_the_node_limit_leaves_a_sample_open_and_runs_are_equal_to_the_bit(hard: Hard) -> None:
    net, x, y, eps = hard
    first, second = (Exact(eps=eps, nodes=100, milp_below=0)(net, x, y) for _ in range(2))
    assert first.status == ("open",)
    assert 90 <= first.details["nodes"].item() <= 100
    assert first.radius.item() == 0
    assert same(first, second)
    assert first.margin.item() <= lowest_reached(net, x, y, "linf", eps).item()
    more = Exact(eps=eps, nodes=400, milp_below=0)(net, x, y)
    assert more.margin.item() >= first.margin.item()  # anytime: the bound only rises


@pytest.mark.parametrize("milp_below", [0, 10**6])
def test_the_time_limit_is_kept(hard: Hard, milp_below: int) -> None:
    net, x, y, eps = hard
    start = time.perf_counter()
    proof = Exact(eps=eps, nodes=10**9, seconds=0.4, milp_below=milp_below)(net, x, y)
    assert proof.status == ("timeout",)
    assert time.perf_counter() - start < 0.4 + 0.5
    assert proof.radius.item() == 0


def test_a_network_that_is_not_even_unrolled_in_time_times_out(hard: Hard) -> None:
    net, x, y, eps = hard
    proof = Exact(eps=eps, seconds=1e-6)(net, x, y)
    assert proof.status == ("timeout",)
    assert proof.radius.item() == 0


# ---- a pruned network trained on digits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, Tensor, Tensor]:
    """cnn_small on digits, 10 % of its weights, trained on one-step adversaries; correctly classified test images."""
    data, eps = load("digits"), 0.08
    x, y = data.train.pixels(), data.train.labels
    net = build_model("cnn_small", data.shape, data.classes)
    ascent, generator = torch.optim.Adam(net.parameters(), 3e-3), torch.Generator().manual_seed(0)
    masks: list[tuple[Tensor, Tensor]] = []
    for epoch in range(14):
        if epoch == 6:
            weights = [layer.weight.data for layer in net if isinstance(layer, nn.Conv2d | nn.Linear)]
            masks = [(w, (w.abs() >= w.abs().flatten().topk(w.numel() // 10).values[-1]).float()) for w in weights]
        for at in torch.randperm(len(x), generator=generator).split(64):
            start = x[at].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(start), y[at]), start)
            loss = F.cross_entropy(net((x[at] + eps * gradient.sign()).clamp(0, 1)), y[at])
            ascent.zero_grad()
            loss.backward()
            ascent.step()
            for weight, mask in masks:
                weight.mul_(mask)
    net = net.eval().requires_grad_(False)
    right = labels(net, data.test.pixels()) == data.test.labels
    assert right.float().mean() > 0.85
    return net, data.test.pixels()[right][:40], data.test.labels[right][:40]


def test_on_a_pruned_network_it_decides_more_than_crown_and_contradicts_neither_crown_nor_pgd(
    pruned: tuple[nn.Module, Tensor, Tensor],
) -> None:
    net, x, y = pruned
    eps = Fraction(1, 10)
    proof, crown = Exact(eps=eps)(net, x, y), Crown(eps=eps)(net, x, y)
    adversary = PGD(norm="linf", eps=eps, steps=40, loss="margin")(net, x, y)
    fooled = labels(net.double(), adversary.double()) != y
    net.float()
    proved = torch.tensor([status == "proved" for status in proof.status])
    broken = torch.tensor([status == "broken" for status in proof.status])
    assert proved[crown.radius > 0].all()
    assert broken[fooled].all()
    assert proved.sum() > (crown.radius > 0).sum()
    assert (proved | broken).sum() >= 38
    assert proof.witness is not None
    assert within(proof.witness[broken], x[broken], "linf", eps).all()


def test_a_wrong_label_is_never_certified_nor_called_broken(pruned: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = pruned
    proof = Exact(eps=Fraction(1, 1000))(net, x[:4], (y[:4] + 1) % 10)
    assert proof.status == ("open",) * 4
    assert (proof.radius == 0).all()


# ---- the falsifier, rounding, refusals -----------------------------------------------------------------------------------


def test_a_falsifier_proposes_and_is_not_believed(pruned: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Images far outside of the ball, and NaN: what counts is put into the ball and judged by the float64 network."""
    net, x, y = pruned
    eps = Fraction(1, 10)
    asked: list[int] = []

    def absurd(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        asked.append(len(images))
        return torch.full_like(images, torch.nan) if len(asked) == 1 else images + 100

    plain = Exact(eps=eps)(net, x[:10], y[:10])
    for _ in range(2):
        proof = Exact(eps=eps, falsifier=absurd)(net, x[:10], y[:10])
        assert proof.status == plain.status
        assert proof.witness is not None
        found = ~proof.witness.flatten(1).isnan().any(1)
        assert within(proof.witness[found], x[:10][found], "linf", eps).all()
    assert asked == [10, 10]


def test_what_the_falsifier_breaks_needs_no_node() -> None:
    """f_0 - f_1 = 0.3 - relu(x1 + x2 - 1.6) on the ball of radius 2/5 around (0.6, 0.6): only near (1, 1) below 0."""
    net = nn.Sequential(linear([[1, 1]], [-1.6]), nn.ReLU(), linear([[-1], [0]], [0.3, 0.0]))
    x, y = torch.tensor([[0.6, 0.6]]), torch.tensor([0])
    assert labels(net, torch.ones(1, 2)).item() == 1

    def corner(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        return torch.ones_like(images)

    proof = Exact(eps=Fraction(2, 5), falsifier=corner)(net, x, y)
    assert proof.status == ("broken",)
    assert proof.details["nodes"].item() == 0
    assert Exact(eps=Fraction(2, 5))(net, x, y).status == ("broken",)


@pytest.mark.parametrize("options", [{}, BRANCHING])
@pytest.mark.parametrize("margin, status", [(1e-7, "open"), (1.0, "proved")])
def test_a_margin_inside_the_float64_allowance_is_not_certified(margin: float, status: str, options: dict[str, int]) -> None:
    """f_0 - f_1 is the same everywhere, as the difference of values near 1e6 that cancel: 1e-7 is too near to zero to count."""
    net = nn.Sequential(linear([[1e6, 0.0], [-1e6, 0.0]], [1e6, 2e6]), nn.ReLU(), linear([[1, 1], [0, 0]], [0.0, 0.0])).double()
    with torch.no_grad():
        net[2].bias.copy_(torch.tensor([-3e6 + margin, 0.0], dtype=torch.float64))
    x, y = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([0])
    assert net(x)[0, 0] > 0
    assert Exact(eps=Fraction(1, 100), **options)(net, x, y).status == (status,)


def test_a_relu_in_place_that_spoils_another_reader_is_refused() -> None:
    """y + relu_(y) computes 2 relu(y); as a graph it reads y + relu(y)."""
    net = Forward(
        lambda s, x: s.head(torch.add(*(lambda z: (z, F.relu(z, inplace=True)))(s.a(x)))), a=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )
    x = images(2, (4,))
    with pytest.raises(UnsupportedNetworkError):
        Exact(eps=Fraction(1, 100))(randomised(net), x, labels(net, x))


@pytest.mark.parametrize("name", ["Tanh", "Sigmoid"])
def test_networks_other_than_relu_networks_are_refused_by_name(name: str) -> None:
    net = randomised(RULE_NETS[name]())
    x = images(2)
    with pytest.raises(UnsupportedNetworkError, match=name):
        Exact(eps=Fraction(1, 5))(net, x, labels(net, x))


@pytest.mark.parametrize(
    "fields, words",
    [({"norm": "l2"}, "linf only"), ({"nodes": 0}, "nodes"), ({"milp_below": -1}, "milp_below"), ({"seconds": 0.0}, "positive")],
)
def test_senseless_questions_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Exact(**fields)


def test_no_images_give_an_empty_proof() -> None:
    proof = Exact()(TOY(), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert (proof.status, len(proof.radius), len(proof.margin)) == ((), 0, 0)
