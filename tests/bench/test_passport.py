"""The passport against counts by hand, published examples, and brute force over networks small enough for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import UserError
from bench.models import build_model
from bench.passport import blocks, claim_holds, distinct, index_bits, passport, patterns, payload, size
from bench.reach import reach
from bench.sparsity import kept_of, prunable, top_k, weights
from verifiers import UnsupportedNetworkError


def linear(rows: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def sparse(model: nn.Module, density: str, seed: int = 0) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in prunable(model).values():
            scores = torch.rand(layer.weight.shape, generator=draw)
            layer.weight.mul_(top_k(scores, kept_of(scores.numel(), Fraction(density))))
    return model.eval()


def by_hand() -> nn.Module:
    """Two pixels, three hidden units, two logits: units 0 (no outgoing) and 1 (no incoming, bias below 0) are dead."""
    return nn.Sequential(
        nn.Flatten(), linear([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]], [0.1, -0.5, 0.2]), nn.ReLU(),
        linear([[0.0, 5.0, 1.0], [0.0, 0.0, 1.0]], [0.0, 0.0]),
    ).eval()  # fmt: skip


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_every_count_of_a_network_made_by_hand() -> None:
    found = passport(by_hand(), (1, 1, 2))
    assert (found["kept"], found["total"], found["density"]) == (6, 12, 0.5)
    assert found["conv"] == {"kept": 0, "total": 0, "density": None}
    assert found["linear"] == {"kept": 6, "total": 12, "density": 0.5}
    first, second = found["layers"]["1"], found["layers"]["3"]
    assert (first["kept"], first["distinct_values"], second["kept"], second["distinct_values"]) == (3, 3, 3, 2)
    assert (first["units"], first["units_without_incoming"], first["units_without_way_out"], first["units_dead"]) == (3, 1, 1, 2)
    assert (first["inputs_without_outgoing"], second["inputs_without_outgoing"]) == (0, 1)
    # unit 0 leads nowhere (its 2 weights), unit 1 is always 0 (its outgoing 5): 3 of 6 weights can matter
    assert found["reachable"] == {"kept": 3, "total": 12, "density": 0.25}
    assert (first["reachable"], second["reachable"]) == (1, 2)
    # unit 2 is what is left: one of its two weights is a zero, and both of its readers stay
    assert found["compacted"] == {
        "kept": 3, "total": 4, "density": 0.75, "constant": False, "units": [3, 5], "layers": {"1": [1, 3], "3": [2, 2]},
    }  # fmt: skip
    json.dumps(found, allow_nan=False)


def test_a_unit_that_only_a_bias_feeds_still_matters_when_relu_lets_it_through() -> None:
    model = by_hand()
    with torch.no_grad():
        model.get_submodule("1").bias[1] = 0.5
    assert passport(model, (1, 1, 2))["reachable"]["kept"] == 4


def test_conv_and_linear_parts_are_counted_apart_and_tiny_weights_are_weights() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), linear([[1e-38, 0.0]])).eval()
    with torch.no_grad():
        model.get_submodule("0").weight.zero_()[1, 0, 1, 1] = -1e-45
    found = passport(model, (1, 2, 2))
    assert found["conv"] == {"kept": 1, "total": 8, "density": 1 / 8}
    assert found["linear"] == {"kept": 1, "total": 2, "density": 1 / 2}
    assert found["layers"]["0"]["units_without_incoming"] == 1


def test_matrices_outside_conv_and_linear_layers_are_named_as_uncounted() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    assert passport(model)["uncounted"] == {"1.weight": 6}
    assert passport(by_hand())["uncounted"] == {}


def test_a_network_without_weights_has_no_passport() -> None:
    with pytest.raises(UserError, match="no convolution or linear layer"):
        passport(nn.Sequential(nn.Flatten()), (1, 2, 2))


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nnz, values, bits", [
    (10_000, 256, 88_192), (200, 256, 6_400),  # the published examples
    (100, 1, 32), (1, 1, 32), (0, 0, 0), (2, 2, 64), (3, 2, 67), (257, 256, 257 * 8 + 32 * 256),
    (70_000, 70_000, 32 * 70_000), (70_000, 65_536, 32 * 70_000),  # a code book that would cost more than it saves
])  # fmt: skip
def test_bits_of_non_zeros_and_code_books(nnz: int, values: int, bits: int) -> None:
    assert payload(nnz, values) == bits


def test_the_published_examples_on_real_tensors() -> None:
    for nnz, bits in ((10_000, 88_192), (256, 8_192), (200, 6_400)):
        layer = nn.Linear(100, 200, bias=False)
        with torch.no_grad():
            layer.weight.zero_().view(-1)[:nnz] = torch.arange(nnz) % 256 + 1.0
        assert distinct(layer.weight) == min(nnz, 256)
        assert size(nn.Sequential(layer))["paper"] == bits


@pytest.mark.parametrize("arch", ["mlp", "cnn_small", "lenet"])
def test_a_dense_network_has_ratio_exactly_1_with_and_without_positions(arch: str) -> None:
    found = size(build_model(arch, (3, 32, 32), 10))
    assert found["ratio"] == {"paper": 1.0, "csr": 1.0}
    assert found["dense"] == found["plain"] == found["paper"] == found["csr"]


def test_a_pruned_unquantised_network_has_the_ratio_of_its_density() -> None:
    model = sparse(build_model("cnn_small", (1, 8, 8), 10), "0.1")
    found = passport(model)
    assert found["bits"]["ratio"]["paper"] == found["density"]
    assert found["bits"]["ratio"]["csr"] > found["density"]


@pytest.mark.parametrize("flags, bits", [
    ([1, 1, 1, 1], 0), ([0, 1, 0, 1], 2 * 1), ([1, 0, 0, 0], 0), ([0, 0, 0, 1], 1 * 2), ([0, 0, 0, 0], 0), ([1, 0, 0, 1], 2 * 2),
    ([0, 1, 1, 0], 2 * 1),
])  # fmt: skip
def test_positions_cost_the_bits_of_the_largest_step(flags: list[int], bits: int) -> None:
    assert index_bits(torch.tensor(flags).float()) == bits


def test_positions_can_be_decoded_from_their_bits() -> None:
    weight = top_k(torch.rand(400, generator=torch.Generator().manual_seed(2)), 30)
    bits = index_bits(weight) // 30
    places = weight.nonzero().flatten().tolist()
    steps = [b - a - 1 for a, b in zip([-1, *places], places, strict=False)]
    assert max(steps) < 2**bits  # each step - 1 fits its field
    assert bits == 0 or max(steps) >= 2 ** (bits - 1)  # and no narrower field would do


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept, claim, holds", [
    (11, "0.99", True), (12, "0.99", False), (1000, "0", True), (1, "1", True), (2, "1", False),
    (501, "0.5", True), (502, "0.5", False), (10, "0.9905", True), (11, "0.9905", False),
])  # fmt: skip
def test_a_claim_allows_its_share_and_one_weight_per_layer(kept: int, claim: str, holds: bool) -> None:
    layer = nn.Linear(100, 10)
    with torch.no_grad():
        layer.weight.fill_(0).flatten()[:kept] = 1e-30  # tiny is not zero
    found, sentence = claim_holds(nn.Sequential(layer), Fraction(claim))
    assert found is holds
    assert f"{kept:,} of 1,000" in sentence


@pytest.mark.parametrize("density", ["0.1", "0.01", "0.001", "1/3"])
def test_a_network_pruned_per_layer_by_our_rule_keeps_its_claim_and_one_weight_more_may_break_it(density: str) -> None:
    model = sparse(build_model("cnn_small", (1, 8, 8), 10), density)
    assert claim_holds(model, 1 - Fraction(density))[0]
    with torch.no_grad():
        model.get_submodule("fc1").weight.view(-1)[:] = 1e-20
    assert not claim_holds(model, 1 - Fraction(density))[0]


def test_biases_never_count_for_a_claim_and_claims_outside_0_to_1_are_refused() -> None:
    model = sparse(build_model("mlp", (1, 8, 8), 10), "0.01")
    assert any(bool((value != 0).all()) for name, value in model.named_parameters() if name.endswith("bias"))
    assert claim_holds(model, Fraction(99, 100))[0]
    for claim in (Fraction(-1, 100), Fraction(101, 100)):
        with pytest.raises(UserError, match="from 0 to 1"):
            claim_holds(model, claim)


# ---- patterns --------------------------------------------------------------------------------------------------------


def test_patterns_are_named_exactly_where_they_hold() -> None:
    assert patterns(torch.tensor([[1.0, 1, 0, 0, 0, 1, 1, 0]])) == ["2:4", "4:8"]
    assert patterns(torch.tensor([[1.0, 0, 0, 0, 0, 1, 0, 0]])) == ["1:2", "1:4", "2:4", "2:8", "4:8"]
    assert patterns(torch.tensor([[1.0, 1, 1, 0, 0, 1, 0, 0]])) == ["4:8"]
    assert patterns(torch.ones(3, 8)) == []
    assert patterns(torch.zeros(3, 8)) == []
    assert patterns(torch.tensor([[1.0, 0, 0]])) == []  # no run of M fits 3 inputs


def test_patterns_of_convolutions_run_along_input_channels() -> None:
    weight = torch.zeros(2, 4, 3, 3)
    weight[:, :2] = 1.0
    assert patterns(weight) == ["2:4"]
    weight[0, 2, 1, 1] = 1.0
    assert patterns(weight) == []


def test_a_pattern_of_the_whole_network_must_hold_in_every_layer_it_fits() -> None:
    half = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model.get_submodule("1").weight.copy_(half)
    assert passport(model)["patterns"] == ["8:16"]
    with torch.no_grad():
        model.get_submodule("2").weight.mul_(half[:3, :8])
    assert passport(model)["patterns"] == ["2:4", "4:8", "8:16"]


def test_block_patterns_need_whole_blocks_of_both_kinds() -> None:
    weight = torch.zeros(8, 16)
    weight[:4, 4:8] = torch.randn(4, 4).abs() + 1
    assert set(blocks(weight)) == {"4x4", "2x2", "1x4", "4x1"}
    weight[0, 4] = 0
    assert blocks(weight) == []
    assert blocks(torch.ones(8, 16)) == blocks(torch.zeros(8, 16)) == []


def test_pruned_filters_channels_and_kernels_are_recognised() -> None:
    weight = torch.ones(5, 3, 3, 3)
    weight[2] = 0
    assert blocks(weight) == ["output", "kernel"]
    weight = torch.ones(5, 3, 3, 3)
    weight[:, 1] = 0
    assert blocks(weight) == ["input", "kernel"]
    weight[0, 0] = 0
    assert blocks(weight) == ["kernel"]


# ---- reachability ----------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A residual block with BatchNorm, both kinds of pooling, a concatenation and functions instead of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm, self.unused = nn.BatchNorm2d(4), nn.Linear(3, 3)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(4 * 9 + 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)) + x
        parts = [self.pool(x).flatten(1), torch.flatten(F.avg_pool2d(x, 3, 3, 1), 1)]
        return self.head(torch.cat(parts, 1))


def branches(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Branches()
    model.head = nn.Linear(4 * 9 + 4 * 4, 3)
    with torch.no_grad():
        model.norm.bias.copy_(torch.tensor([0.5, -0.5, 0.0, -0.1]))
        model.norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.0, 0.0]))
        model.norm.weight[2] = 0
    return model


def convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 4, 2, padding=1, dilation=2), nn.ReLU6(), nn.Flatten(),
        nn.Linear(4 * 2 * 2, 6), nn.Hardtanh(0, 4), nn.Linear(6, 3),
    )  # fmt: skip


def units(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3, bias=False))
    with torch.no_grad():
        model[1].bias.mul_(torch.rand(12) < 0.5)
        model[3].bias.zero_()
    return model


@pytest.mark.parametrize("density", ["0.3", "0.1", "0.03"])
@pytest.mark.parametrize("make", [branches, convolutions, units])
def test_weights_left_out_can_take_any_values_at_once_without_moving_a_logit(
    make: Callable[[int], nn.Module], density: str
) -> None:
    left_out = 0
    for seed in range(8):
        model = sparse(make(seed), density, seed)
        live = reach(model, (1, 6, 6)).live
        x = torch.cat([torch.rand(40, 1, 6, 6), torch.rand(40, 1, 6, 6).round()])
        before = model(x)
        with torch.no_grad():
            for name, layer in prunable(model).items():
                removed = (layer.weight != 0) & ~live[name]
                left_out += int(removed.sum())
                layer.weight[removed] = 100 * torch.randn(int(removed.sum()))
        assert torch.equal(model(x), before)
    assert left_out > 0


@pytest.mark.parametrize("make", [convolutions, units])
def test_no_weight_that_counts_could_be_left_out_for_lack_of_a_path(make: Callable[[int], nn.Module]) -> None:
    """In a network with positive weights and no bias nothing cancels, so a weight counts if and only if it moves a logit."""
    counted = 0
    for seed in range(4):
        model = sparse(make(seed), "0.15", seed)
        with torch.no_grad():
            for layer in prunable(model).values():
                layer.weight.abs_().mul_(0.1)
                if layer.bias is not None:
                    layer.bias.zero_()
        live, x = reach(model.double(), (1, 6, 6)).live, 0.1 + torch.rand(2, 1, 6, 6).double() / 10
        before = model(x)
        for name, layer in prunable(model).items():
            for at in (layer.weight != 0).nonzero().tolist():
                with torch.no_grad():
                    old = layer.weight[tuple(at)].clone()
                    layer.weight[tuple(at)] = 0
                    moved = not torch.equal(model(x), before)
                    layer.weight[tuple(at)] = old
                assert moved == bool(live[name][tuple(at)]), (name, at)
                counted += moved
    assert counted > 20


def test_all_weights_of_a_dense_network_count_except_taps_that_only_see_padding() -> None:
    for arch in ("mlp", "cnn_small", "cnn_large"):
        model = build_model(arch, (1, 8, 8), 10).eval()
        assert all(bool(live.all()) for live in reach(model, (1, 8, 8)).live.values())
    live = reach(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten()).eval(), (1, 1, 1)).live["0"]
    assert live.int().flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_layers_that_are_never_called_and_groups_without_a_way_out_do_not_count() -> None:
    model = branches(0).eval()
    found = reach(model, (1, 6, 6))
    assert not found.live["unused"].any()
    assert not found.heard["unused"].any()
    assert bool(found.heard["conv2"].all())
    assert found.heard["conv1"].tolist() == [True, True, False, True]  # its BatchNorm multiplies channel 2 by 0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * 2


@pytest.mark.parametrize("model, reason", [
    (Scaled(), "mul"),
    (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.Flatten()), "padding_mode='circular'"),
    (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten()).train(), "eval mode"),
    (nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, divisor_override=-4), nn.Flatten()), "negative divisor"),
    (nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(1, dilation=2), nn.Flatten()), "dilation"),
    (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "could not be followed"),
])  # fmt: skip
def test_a_graph_without_rules_is_named_and_the_rest_of_the_passport_stays(model: nn.Module, reason: str) -> None:
    found = passport(model, (1, 2, 2))
    assert reason in found["reachable"]["not_computed"]
    assert found["kept"] == sum(int((w != 0).sum()) for w in weights(model).values())
    assert "reachable" not in next(iter(found["layers"].values()))


def test_without_the_images_shape_reachability_is_not_computed() -> None:
    assert "shape" in passport(by_hand())["reachable"]["not_computed"]
    with pytest.raises(UnsupportedNetworkError):
        reach(Scaled(), (1, 2, 2))


def test_a_bias_that_only_rounding_puts_below_zero_does_not_cut_a_channel_off() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean.fill_(1.0)
        model[1].bias.fill_(1.0)  # 1 - 1 / sqrt(1 + 1e-5): just above 0
        assert reach(model, (1, 2, 2)).live["4"].all()
        model[1].bias.fill_(0.9)
        assert not reach(model, (1, 2, 2)).live["4"].any()


@pytest.mark.parametrize("layer, matters", [
    (nn.ReLU(), False), (nn.ReLU6(), False), (nn.Tanh(), False), (nn.LeakyReLU(), False), (nn.ELU(), False), (nn.GELU(), False),
    (nn.SiLU(), False), (nn.Hardtanh(), False), (nn.Identity(), False), (nn.Dropout(), False),
    (nn.Sigmoid(), True), (nn.Hardtanh(0.5, 2.0), True), (nn.Hardtanh(-2.0, -0.5), True),
])  # fmt: skip
def test_what_follows_a_unit_always_0_counts_where_an_activation_makes_it_something(layer: nn.Module, matters: bool) -> None:
    model = nn.Sequential(nn.Flatten(), linear([[0.0]], [0.0]), layer, linear([[1.0]])).eval()
    assert bool(reach(model, (1, 1, 1)).live["3"].item()) is matters
    before = model(torch.rand(5, 1, 1, 1))
    with torch.no_grad():
        model[3].weight.fill_(7.0)
    assert torch.equal(model(torch.rand(5, 1, 1, 1)), before) is not matters


class Sum(nn.Module):
    """ReLU of the sum of two units that are constants, behind a weight."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.a, self.b, self.c = linear([[0.0]], [first]), linear([[0.0]], [second]), linear([[1.0]])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.c(torch.relu(self.a(x) + self.b(x)))


@pytest.mark.parametrize("first, second", [(0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 0.0), (2.0, -1.0)])
def test_sums_of_constants_count_exactly_when_relu_lets_them_through(first: float, second: float) -> None:
    assert bool(reach(Sum(first, second).eval(), (1, 1, 1)).live["c"].item()) is (first + second > 0)


def test_the_number_of_paths_may_exceed_every_floating_point_number() -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(60, 60) for _ in range(190))).eval()  # 60^190 paths
    model[3].weight.data[:, 7] = 0
    live = reach(model, (1, 6, 10)).live
    assert sum(int((~one).sum()) for one in live.values()) == 60 + 60  # that column, and the row that leads to it
