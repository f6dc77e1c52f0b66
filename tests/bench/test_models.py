"""Architectures against the published sizes, at the edges of what they admit, and with eps in pixel units."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from attacks import PGD
from bench.errors import UserError
from bench.models import MODELS, build_model
from bench.sparsity import kept_of, prunable
from verifiers.normalise import Normalize

SMALLEST = {"mlp": 1, "cnn_small": 4, "cnn_large": 4, "lenet": 16}
RGB, GREY = (3, 32, 32), (1, 28, 28)


# methods.md 6.1: N counts convolution and linear weights only, total adds biases
@pytest.mark.parametrize(
    "name, shape, prunable_weights, total, layers",
    [
        ("cnn_small", RGB, 214_760, 214_918, 4),
        ("cnn_large", RGB, 2_465_632, 2_466_858, 7),
        ("cnn_small", GREY, 166_248, 166_406, 4),
        ("cnn_large", GREY, 1_973_536, 1_974_762, 7),
        ("lenet", GREY, 430_500, 431_080, 4),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, shape: tuple[int, int, int], prunable_weights: int, total: int, layers: int
) -> None:
    model = build_model(name, shape, 10)
    weights = [value for key, value in model.named_parameters() if key.endswith("weight")]
    assert sum(value.numel() for value in weights) == prunable_weights
    assert sum(value.numel() for value in model.parameters()) == total
    assert len(weights) == layers
    assert [layer.weight.numel() for layer in prunable(model).values()] == [value.numel() for value in weights]


# methods.md 6.1: K_l = n_l - floor((1 - k) n_l), summed over the layers, at 90, 95 and 99 % pruned
@pytest.mark.parametrize(
    "name, kept", [("cnn_small", (21_477, 10_739, 2_148)), ("cnn_large", (246_567, 123_285, 24_660))]
)
def test_kept_counts_per_layer_add_up_to_the_published_sums(name: str, kept: tuple[int, int, int]) -> None:
    sizes = [layer.weight.numel() for layer in prunable(build_model(name, RGB, 10)).values()]
    densities = (Fraction("0.1"), Fraction("0.05"), Fraction("0.01"))
    assert tuple(sum(kept_of(size, density) for size in sizes) for density in densities) == kept


def test_every_model_has_a_smallest_image_in_this_file() -> None:
    assert set(SMALLEST) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("larger", [0, 1, 2, 3])
def test_a_model_takes_images_from_its_smallest_side_on_odd_ones_included(name: str, channels: int, larger: int) -> None:
    side = SMALLEST[name] + larger
    model = build_model(name, (channels, side, side), 7).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, channels, side, side))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", [name for name, side in SMALLEST.items() if side > 1])
def test_one_pixel_below_the_smallest_side_is_a_user_error(name: str) -> None:
    side = SMALLEST[name] - 1
    with pytest.raises(UserError, match=f"{name} needs images of at least {side + 1}x{side + 1} pixels, got {side}x{side}"):
        build_model(name, (1, side, side), 10)


@pytest.mark.parametrize("name", MODELS)
def test_images_that_are_not_square_are_taken_by_the_mlp_and_refused_by_the_others(name: str) -> None:
    if name == "mlp":
        assert build_model(name, (3, 20, 24), 10)(torch.rand(2, 3, 20, 24)).shape == (2, 10)
    else:
        with pytest.raises(UserError, match=f"{name} takes square images, not 20x24; use mlp"):
            build_model(name, (3, 20, 24), 10)


def test_an_unknown_model_offers_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="unknown model 'cnn_smal'; did you mean 'cnn_small'"):
        build_model("cnn_smal", GREY, 10)


# ---- normalisation ---------------------------------------------------------------------------------------------------

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


def test_normalisation_is_the_first_layer_and_leaves_the_state_dict_plain() -> None:
    bare, normalised = build_model("cnn_small", (3, 8, 8), 10), build_model("cnn_small", (3, 8, 8), 10, MEAN, STD)
    assert isinstance(next(iter(normalised)), Normalize)
    assert list(normalised.state_dict()) == list(bare.state_dict())
    normalised.load_state_dict(bare.state_dict())
    x = torch.rand(4, 3, 8, 8)
    by_hand = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalised(x), bare(by_hand))


@pytest.mark.parametrize("mean, std", [(MEAN, ()), ((), STD)])
def test_a_mean_without_std_and_a_std_without_mean_are_complete(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    x = torch.rand(2, 3, 8, 8)
    first = next(iter(build_model("mlp", (3, 8, 8), 10, mean, std)))
    shift, scale = torch.tensor(mean or (0.0,) * 3).view(3, 1, 1), torch.tensor(std or (1.0,) * 3).view(3, 1, 1)
    torch.testing.assert_close(first(x), (x - shift) / scale)


@pytest.mark.parametrize(
    "mean, std, complaint",
    [
        ((0.5,), (0.2, 0.2, 0.2), r"one number per channel \(3\), got 1 and 3"),
        ((0.5,) * 3, (0.2, 0.2), r"one number per channel \(3\), got 3 and 2"),
        ((0.5,) * 3, (0.2, 0.0, 0.2), "std must be positive, got 0.2, 0.0, 0.2"),
        ((0.5,) * 3, (0.2, float("nan"), 0.2), "std must be positive"),
    ],
)
def test_a_wrong_normalisation_is_a_user_error(mean: tuple[float, ...], std: tuple[float, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build_model("mlp", (3, 8, 8), 10, mean, std)


def test_eps_is_in_pixel_units_behind_a_normalisation() -> None:
    """methods.md 8, item 9: the un-normalised change of a constant 0.5 image is 8/255 and no more."""
    eps, seen = Fraction(8, 255), []
    model = build_model("cnn_small", (3, 8, 8), 10, MEAN, STD).eval()
    first = next(iter(model))
    first.register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
    x, y = torch.full((1, 3, 8, 8), 0.5), torch.tensor([0])
    PGD(eps=eps, steps=10, last=True)(model, x, y)
    start = first(x)
    change = [((z - start) * torch.tensor(STD).view(3, 1, 1)).abs().max().item() for z in seen[:-1]]
    assert max(change) == pytest.approx(float(eps), abs=1e-6)


# ---- seeds -----------------------------------------------------------------------------------------------------------


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("name", MODELS)
def test_equal_seeds_give_equal_weights_whatever_was_drawn_before(name: str) -> None:
    shape = (1, 16, 16)
    first = build_model(name, shape, 10, seed=3)
    torch.rand(7)
    assert equal(first, build_model(name, shape, 10, seed=3))
    assert not equal(first, build_model(name, shape, 10, seed=4))


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_model("mlp", (1, 8, 8), 10, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
