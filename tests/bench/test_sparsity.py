"""Sparsity parts: exact counts, ties by index, gradients through masks and scores, and a plain network at the end."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.methods.hydra import proposed
from bench.sparsity import (
    Mask,
    TopKScores,
    attach,
    density_of,
    effective_state,
    is_attached,
    keep_largest,
    kept_of,
    layer_counts,
    mask_layers,
    prunable,
    rescale_,
    top_k,
    weights,
)
from verifiers.normalise import Normalize

Net = Callable[..., nn.Sequential]
DENSITIES = ("0.9", "0.99", "0.5", "0.1", "0.05", "0.01", "0.3", "0.7", "1/3", "2/7", "0.001", "1")


# ---- how many --------------------------------------------------------------------------------------------------------


def test_432_weights_at_density_a_tenth_keep_44() -> None:
    assert kept_of(432, Fraction("0.1")) == 44


@pytest.mark.parametrize("density", DENSITIES)
def test_the_kept_count_is_the_smallest_whole_number_not_below_density_times_size(density: str) -> None:
    share = Fraction(density)
    for size in range(1, 300):
        counted = sum(place < share * size for place in range(size))  # brute force in exact arithmetic
        assert kept_of(size, share) == counted
        assert 1 <= kept_of(size, share) <= size


def test_float_arithmetic_would_keep_one_more_at_density_nine_tenths() -> None:
    flipped = [size for size in range(1, 300) if size - floor((1 - 0.9) * size) != kept_of(size, Fraction("0.9"))]
    assert len(flipped) >= 29
    assert 10 in flipped


# ---- which -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_top_k_prunes_what_a_stable_sort_puts_first(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    pruned = np.argsort(scores.numpy(), kind="stable")[: len(values) - keep]
    mask = top_k(scores, keep)
    assert int(mask.sum()) == keep
    assert sorted((mask == 0).nonzero().flatten().tolist()) == sorted(pruned.tolist())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4), st.integers(1, 4))
def test_top_k_keeps_exactly_that_many_of_any_floats(values: list[float], keep: int) -> None:
    mask = top_k(torch.tensor(values).view(2, 2), keep)
    assert mask.shape == (2, 2)
    assert int(mask.sum()) == keep
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_of_equal_scores_the_lower_index_is_pruned_first() -> None:
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), 3).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert top_k(torch.zeros(4), 1).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert top_k(torch.zeros(2, 2), 4).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_keep_largest_counts_per_layer_not_over_the_network() -> None:
    masks = keep_largest({"small": torch.rand(10), "large": 100 + torch.rand(30)}, Fraction("0.1"))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 1, "large": 3}


def test_prunable_are_convolutions_and_linear_layers_first_and_last_included(net_of: Net) -> None:
    assert list(prunable(net_of(batchnorm=True))) == ["0", "4", "6"]


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_a_masked_weight_is_zero_and_gets_no_gradient_the_others_get_the_dense_one() -> None:
    layer, x = nn.Linear(3, 2, bias=False), torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    attach(layer, Mask(mask))
    layer(x).sum().backward()
    assert torch.equal(layer.weight == 0, mask == 0)
    assert torch.equal(layer.parametrizations.weight.original.grad, mask * x)


def test_the_straight_through_gradient_of_the_scores_is_the_magnitude_on_all_entries() -> None:
    """methods.md 1.1, test 2: W = (2, -1, 0.5), x = (1, 1, 1), loss = output, density 1/3."""
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -1.0, 0.5]]))
    part = TopKScores(proposed(layer.weight.detach()), kept_of(3, Fraction(1, 3)))
    attach(layer, part)
    output = layer(torch.ones(1, 3))
    assert output.item() == 2.0
    output.sum().backward()
    assert part.scores.grad.tolist() == [[2.0, 1.0, 0.5]]


def test_scores_are_ranked_by_magnitude_and_their_mask_is_the_one_the_forward_pass_uses() -> None:
    layer = nn.Linear(2, 2, bias=False)
    part = TopKScores(torch.tensor([[-5.0, 1.0], [2.0, -3.0]]), 2)
    attach(layer, part)
    assert part.mask().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert torch.equal(layer.weight != 0, part.mask() != 0)


def test_a_part_does_not_share_memory_with_the_scores_it_was_given() -> None:
    scores = torch.ones(2, 2)
    part = TopKScores(scores, 2)
    scores.zero_()
    assert float(part.scores.detach().sum()) == 4


# ---- attach ----------------------------------------------------------------------------------------------------------


def random_masks(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return keep_largest({n: torch.rand(w.shape, generator=generator) for n, w in weights(model).items()}, Fraction(1, 4))


def test_attaching_replaces_the_part_before_and_leaves_the_dense_weight_to_the_bit(net_of: Net) -> None:
    model = net_of()
    before = {name: weight.clone() for name, weight in weights(model).items()}
    mask_layers(model, random_masks(model, 1))
    second = random_masks(model, 2)
    mask_layers(model, second)
    for name, layer in prunable(model).items():
        assert len(layer.parametrizations.weight) == 1
        assert torch.equal(layer.parametrizations.weight.original, before[name])
        assert torch.equal(layer.weight, before[name] * second[name])


def test_a_mask_on_one_network_does_not_reach_its_twin(net_of: Net) -> None:
    model, twin = net_of(), net_of()
    mask_layers(model, random_masks(model))
    assert is_attached(model)
    assert not is_attached(twin)
    assert density_of(twin) == 1


def test_rescaling_multiplies_kept_weights_by_the_inverse_root_of_the_density(net_of: Net) -> None:
    model = net_of()
    dense = {name: weight.clone() for name, weight in weights(model).items()}
    masks = random_masks(model)
    mask_layers(model, masks)
    rescale_(model, Fraction(1, 4))
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, 2 * dense[name] * masks[name])
    # so the sum of squares, and with it the variance of a unit's input, is that of the dense layer
    wide = nn.Sequential(nn.Linear(400, 400))
    before = float(wide[0].weight.detach().square().sum())
    mask_layers(wide, random_masks(wide))
    rescale_(wide, Fraction(1, 4))
    assert float(wide[0].weight.detach().square().sum()) == pytest.approx(before, rel=0.02)


# ---- the plain network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["mask", "scores", "none"])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_the_effective_state_in_a_fresh_network_computes_what_the_parametrized_one_does(
    net_of: Net, part: str, batchnorm: bool
) -> None:
    model, x = net_of(batchnorm=batchnorm), torch.rand(9, 1, 8, 8)
    if part == "mask":
        mask_layers(model, random_masks(model))
    elif part == "scores":
        for layer in prunable(model).values():
            attach(layer, TopKScores(torch.randn(layer.weight.shape), kept_of(layer.weight.numel(), Fraction("0.2"))))
    model(x)  # BatchNorm statistics are part of the state
    state = effective_state(model)
    fresh = net_of(seed=1, batchnorm=batchnorm)
    assert set(state) == set(fresh.state_dict())
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), atol=1e-6, rtol=0)


def test_the_network_still_works_and_learns_after_its_effective_state_was_taken(net_of: Net) -> None:
    model, x = net_of(), torch.rand(3, 1, 8, 8)
    mask_layers(model, random_masks(model))
    before = model(x)
    for value in effective_state(model).values():
        value.zero_()  # a copy: nothing of the model may move
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None
    assert parametrize.is_parametrized(model[0], "weight")


def test_configuration_buffers_stay_out_of_the_effective_state() -> None:
    model = nn.Sequential(Normalize((0.5,), (0.2,)), nn.Conv2d(1, 2, 3))
    mask_layers(model, {"1": torch.ones(2, 1, 3, 3)})
    assert set(effective_state(model)) == {"1.weight", "1.bias"}


def test_density_counts_exact_zeros_of_weights_and_never_biases() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0, 1e-30, -0.0], [0.0, 0.0, 0.0, -2.0]]))
        model[2].weight.fill_(1.0)
        model[2].bias.zero_()
    assert layer_counts(model) == {"0": (3, 8), "2": (6, 6)}
    assert density_of(model) == Fraction(9, 14)


def test_rescaling_by_a_density_whose_root_is_irrational_uses_the_real_root() -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    dense = model[0].weight.detach().clone()
    mask_layers(model, {"0": torch.ones(1, 3)})
    rescale_(model, Fraction("0.05"))
    torch.testing.assert_close(model[0].weight.detach(), dense / sqrt(0.05))
