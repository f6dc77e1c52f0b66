"""Architectures against the published sizes, at the edges of what they admit, and with eps in pixel units."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from torch import nn

from attacks import PGD
from bench.cells import read_suite
from bench.commands.listing import catalogue
from bench.errors import UserError
from bench.models import ARCHITECTURES, PLAIN, build_model, initialise_
from bench.models.mobilenet import InvertedResidual
from bench.models.resnet import BasicBlock, Bottleneck
from bench.models.wide_resnet import PreActivation
from bench.sparsity import kept_of, prunable
from verifiers.ball import region
from verifiers.bounds import ibp_margins
from verifiers.graph import trace
from verifiers.normalise import Normalize

SMALLEST = {"mlp": 1, "cnn_small": 4, "cnn_large": 4, "lenet": 16}
LARGE = [name for name in ARCHITECTURES if name not in PLAIN]
RGB, GREY = (3, 32, 32), (1, 28, 28)


@dataclass(frozen=True)
class Published:
    """methods.md 6.1: N counts convolution and linear weights only, total adds biases and BatchNorm's affine parameters."""

    name: str
    shape: tuple[int, int, int]
    prunable: int
    total: int
    layers: int
    classes: int = 10


PUBLISHED = [
    Published("cnn_small", RGB, 214_760, 214_918, 4),
    Published("cnn_large", RGB, 2_465_632, 2_466_858, 7),
    Published("cnn_small", GREY, 166_248, 166_406, 4),
    Published("cnn_large", GREY, 1_973_536, 1_974_762, 7),
    Published("lenet", GREY, 430_500, 431_080, 4),
    Published("resnet18", RGB, 11_164_352, 11_173_962, 21),
    Published("resnet34", RGB, 21_265_088, 21_282_122, 37),
    Published("resnet34", RGB, 21_311_168, 21_328_292, 37, classes=100),
    Published("resnet50", RGB, 23_467_712, 23_520_842, 54),
    Published("resnet101", RGB, 42_407_616, 42_512_970, 105),
    Published("resnet50_imagenet", (3, 224, 224), 25_502_912, 25_557_032, 54, classes=1000),
    Published("wrn_16_8", RGB, 10_954_160, 10_961_370, 17),
    Published("wrn_28_2", RGB, 1_463_984, 1_467_610, 29),
    Published("wrn_28_4", RGB, 5_841_840, 5_849_050, 29),
    Published("wrn_28_10", RGB, 36_461_232, 36_479_194, 29),
    Published("vgg16", RGB, 15_302_848, 15_311_818, 16),
    Published("googlenet", RGB, 6_142_528, 6_166_250, 65),
    Published("mobilenet_v2", RGB, 2_261_824, 2_296_922, 58),
]


def outline(name: str, shape: tuple[int, int, int], classes: int = 10) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_model(name, shape, classes)


def sizes(name: str, shape: tuple[int, int, int] = RGB, classes: int = 10) -> list[int]:
    return [layer.weight.numel() for layer in prunable(outline(name, shape, classes)).values()]


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: f"{one.name}-{one.shape[0]}-{one.classes}")
def test_parameter_counts_are_the_published_ones(one: Published) -> None:
    model = outline(one.name, one.shape, one.classes)
    weights = sizes(one.name, one.shape, one.classes)
    assert sum(weights) == one.prunable
    assert sum(value.numel() for value in model.parameters()) == one.total
    assert len(weights) == one.layers


def test_every_architecture_but_our_own_mlp_has_a_published_count() -> None:
    assert {one.name for one in PUBLISHED} == set(ARCHITECTURES) - {"mlp"}


# ATMC's poster prints the dense sizes as 32 bits for each convolution and linear weight
@pytest.mark.parametrize(
    "name, shape, classes, bits",
    [
        ("lenet", GREY, 10, 13_776_000),
        ("resnet34", RGB, 10, 680_482_816),
        ("resnet34", RGB, 100, 681_957_376),
        ("wrn_16_8", RGB, 10, 350_533_120),
    ],
)
def test_dense_sizes_in_bits_are_those_that_atmc_prints(
    name: str, shape: tuple[int, int, int], classes: int, bits: int
) -> None:
    assert 32 * sum(sizes(name, shape, classes)) == bits


# methods.md 6.1: K_l = n_l - floor((1 - k) n_l), summed over the layers, at 90, 95 and 99 % pruned
@pytest.mark.parametrize(
    "name, kept",
    [
        ("cnn_small", (21_477, 10_739, 2_148)),
        ("cnn_large", (246_567, 123_285, 24_660)),
        ("resnet18", (1_116_445, 558_228, 111_653)),
        ("resnet34", (2_126_527, 1_063_274, 212_669)),
        ("resnet50", (2_346_798, 1_173_414, 234_700)),
        ("wrn_28_2", (146_412, 73_211, 14_656)),
        ("wrn_28_4", (584_199, 292_108, 58_434)),
        ("vgg16", (1_530_291, 765_149, 153_035)),
        ("googlenet", (614_280, 307_156, 61_452)),
        ("mobilenet_v2", (226_203, 113_112, 22_638)),
    ],
)
def test_kept_counts_per_layer_add_up_to_the_published_sums(name: str, kept: tuple[int, int, int]) -> None:
    densities = (Fraction("0.1"), Fraction("0.05"), Fraction("0.01"))
    found = sizes(name)
    assert tuple(sum(kept_of(size, density) for size in found) for density in densities) == kept


# methods.md 6.1: K = floor(density N) over the whole network
@pytest.mark.parametrize(
    "name, shape, kept",
    [
        ("lenet", GREY, {"0.0015": 645, "0.005": 2_152, "0.01": 4_305}),
        ("resnet34", RGB, {"0.001": 21_265, "0.005": 106_325, "0.1": 2_126_508}),
        ("wrn_16_8", RGB, {"0.001": 10_954, "0.01": 109_541}),
        ("resnet101", RGB, {"0.005": 212_038, "0.001": 42_407, "0.0008": 33_926}),
    ],
)
def test_kept_counts_of_the_whole_network_are_the_published_ones(
    name: str, shape: tuple[int, int, int], kept: dict[str, int]
) -> None:
    count = sum(sizes(name, shape))
    assert {density: floor(Fraction(density) * count) for density in kept} == kept


# ---- images and classes ----------------------------------------------------------------------------------------------


def test_every_model_has_a_smallest_image_in_this_file() -> None:
    assert set(SMALLEST) == set(PLAIN)


@pytest.mark.parametrize("name", PLAIN)
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


@pytest.mark.parametrize("name", PLAIN)
def test_images_that_are_not_square_are_taken_by_the_mlp_and_refused_by_the_others(name: str) -> None:
    if name == "mlp":
        assert build_model(name, (3, 20, 24), 10)(torch.rand(2, 3, 20, 24)).shape == (2, 10)
    else:
        with pytest.raises(UserError, match=f"{name} takes square images, not 20x24; use mlp"):
            build_model(name, (3, 20, 24), 10)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_architecture_takes_the_images_of_every_data_set_and_those_of_tests(name: str) -> None:
    small = (3, 16, 20) if name == "vgg16" else (1, 8, 9)
    for shape, classes in ((GREY, 10), (RGB, 100), (small, 1000)):
        assert outline(f"{name}@1/16", shape, classes)(torch.rand(2, *shape, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("shape", [(3, 15, 32), (3, 32, 15)])
def test_vgg_needs_sixteen_pixels_for_its_four_pools(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="vgg16 needs images of at least 16x16 pixels, got "):
        build_model("vgg16@1/64", shape, 10)


@pytest.mark.parametrize("name", [name for name in LARGE if name != "resnet50_imagenet"])
def test_the_last_average_pool_has_the_published_window_on_images_of_32_pixels(name: str) -> None:
    windows = {"vgg16": 1, "googlenet": 8, "wrn_16_8": 8, "wrn_28_2": 8, "wrn_28_4": 8, "wrn_28_10": 8}
    model, x = build_model(f"{name}@1/64", RGB, 10).eval(), torch.rand(1, *RGB)
    with torch.no_grad():
        found = model(x)
        model.pool = nn.AvgPool2d(windows.get(name, 4))
        torch.testing.assert_close(model(x), found)


@pytest.mark.parametrize("name", LARGE)
def test_the_weights_do_not_depend_on_the_size_of_the_images(name: str) -> None:
    at = {side: outline(name, (3, side, side)).state_dict() for side in (16, 32)}
    assert {key: value.shape for key, value in at[16].items()} == {key: value.shape for key, value in at[32].items()}


# ---- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_the_width_halves_every_inner_side_of_every_weight(name: str) -> None:
    full, half = (prunable(outline(one, RGB)) for one in (name, f"{name}@1/2"))
    assert list(full) == list(half)
    for place, layer in enumerate(full):
        (outputs, inputs, *kernel), found = full[layer].weight.shape, half[layer].weight.shape
        from_image = place == 0
        depthwise = inputs == 1
        to_logits = place == len(full) - 1
        wanted = (outputs if to_logits else outputs / 2, inputs if from_image or depthwise else inputs / 2, *kernel)
        assert tuple(found) == wanted, layer


def test_channels_are_rounded_to_the_nearest_number_and_never_below_one() -> None:
    stages = [f"layer{i}.0.conv1" for i in (1, 2, 3, 4)]
    for width, channels in {"1/128": [1, 1, 2, 4], "3/100": [2, 4, 8, 15], "1/9999": [1, 1, 1, 1]}.items():
        layers = prunable(outline(f"resnet18@{width}", RGB))
        assert [layers[stage].out_channels for stage in stages] == channels


@pytest.mark.parametrize(
    "width", ["", "1", "1/1", "2/32", "0.5", "3/2", "0/4", "1/0", "-1/2", "1/16 ", "01/16", "1/99999", "\u0661/2"]
)
def test_a_network_has_one_name_so_other_ways_to_write_a_width_are_refused(width: str) -> None:
    with pytest.raises(UserError, match="a width is a fraction below 1 in lowest terms, as in resnet18@1/16; the full width is"):
        build_model(f"resnet18@{width}", RGB, 10)


def test_an_unknown_model_with_a_width_offers_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="unknown model 'resnet19'; did you mean 'resnet18'"):
        build_model("resnet19@1/2", RGB, 10)


SUITE = """
suite = {name = "widths", version = 1}
data = {name = "digits"}
threat = {norm = "linf", eps = "1/10"}
budget = {}
grid = {arch = ["cnn_small", ARCH], density = ["0.1"], seed = [0]}
method = [{name = "dense"}]
objective = [{name = "ibp", eps = "1/10", headline = "certified.ibp"}]
verifier = [{name = "ibp"}]
"""


def test_suites_take_widths_and_their_cells_stay_file_names(tmp_path: Path) -> None:
    path = tmp_path / "widths.toml"
    path.write_text(SUITE.replace("ARCH", '"resnet18@1/16"'))
    cells = read_suite(str(path)).cells
    assert [cell.arch for cell in cells] == ["cnn_small", "resnet18@1/16"]
    assert cells[1].id.startswith("widths@1-resnet18@1of16-dense-ibp-")
    assert "/" not in cells[1].id
    for arch, complaint in {'"resnet18@2/32"': "as in resnet18@1/16", '"resnet19"': "'resnet18'", "18": "model '18'"}.items():
        path.write_text(SUITE.replace("ARCH", arch))
        with pytest.raises(UserError, match=complaint):
            read_suite(str(path))


def test_the_list_of_models_has_every_architecture_with_a_summary() -> None:
    entries = {one["name"]: one["summary"] for one in catalogue("models")}
    assert set(entries) == set(ARCHITECTURES)
    assert all(entries.values())


# ---- inside the networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_layer_is_used_twice_and_no_operation_is_hidden_from_the_bounds(name: str) -> None:
    graph = trace(build_model(f"{name}@1/64", RGB, 10))
    layers = [node.target for node in graph.nodes if node.op == "call_module"]
    assert len(set(layers)) == len(layers)
    assert {node.target.__name__ for node in graph.nodes if node.op == "call_function"} <= {"add", "cat"}
    assert {node.op for node in graph.nodes} <= {"placeholder", "call_module", "call_function", "output"}


@torch.no_grad()
def silenced(block: nn.Module, last: nn.Module) -> nn.Module:
    """The block with random BatchNorm statistics, whose branch beside the shortcut ends in zero."""
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.bias.normal_()
    for value in (last.weight, last.bias):
        if value is not None:
            value.zero_()
    return block.eval()


@torch.no_grad()
def test_a_block_whose_branch_is_silent_is_its_shortcut() -> None:
    x = torch.randn(2, 4, 6, 6)
    for make in (BasicBlock, Bottleneck):  # the sum goes through a ReLU
        same = make(4, 4 // make.expansion, 1)
        torch.testing.assert_close(silenced(same, same.bn3 if make is Bottleneck else same.bn2)(x), x.relu())
        other = make(4, 3, 2)
        silent = silenced(other, other.bn3 if make is Bottleneck else other.bn2)(x)
        torch.testing.assert_close(silent, other.shortcut[1](other.shortcut[0](x)).relu())
        assert silent.shape == (2, 3 * make.expansion, 3, 3)
    inverted = InvertedResidual(4, 4, 6, 1)  # nothing after the sum
    torch.testing.assert_close(silenced(inverted, inverted.bn3)(x), x)
    strided = InvertedResidual(4, 4, 6, 2)  # no shortcut
    assert not silenced(strided, strided.bn3)(x).any()


@torch.no_grad()
def test_a_pre_activation_block_passes_its_input_on_as_it_is_and_a_new_shape_from_the_activated_input() -> None:
    x = torch.randn(2, 4, 6, 6)
    same, other = PreActivation(4, 4, 1, 0.0), PreActivation(4, 8, 2, 0.4)
    torch.testing.assert_close(silenced(same, same.conv2)(x), x)
    found = silenced(other, other.conv2)(x)
    normal = (x - other.bn1.running_mean.view(4, 1, 1)) / (other.bn1.running_var + 1e-5).sqrt().view(4, 1, 1)
    active = (normal + other.bn1.bias.view(4, 1, 1)).clamp_min(0)
    torch.testing.assert_close(found, torch.einsum("oi,nihw->nohw", other.convShortcut.weight[..., 0, 0], active[..., ::2, ::2]))


def test_only_wrn_16_8_has_dropout_and_it_stands_before_the_second_convolution_of_each_block() -> None:
    for name in ARCHITECTURES:
        model = outline(name, RGB)
        rates = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
        assert rates == ([0.4] * 6 if name == "wrn_16_8" else [])
    order = [str(node.target) for node in trace(build_model("wrn_16_8@1/64", RGB, 10)).nodes]
    for place, target in enumerate(order):
        if target.endswith("dropout"):
            assert order[place - 1].endswith("relu2")
            assert order[place + 1].endswith("conv2")


# ---- names -----------------------------------------------------------------------------------------------------------


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
        ((0.5,) * 3, (0.2, 0.0, 0.2), "std must be positive and finite in float32, got 0.2, 0.0, 0.2"),
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


@pytest.mark.parametrize("name", PLAIN)
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


@pytest.mark.parametrize("rule", ["kaiming", "ibp"])
def test_an_initialisation_has_its_variance_and_comes_from_its_seed_alone(rule: str) -> None:
    before = torch.get_rng_state()
    model, other, again = (initialise_(build_model("cnn_large", GREY, 10, seed=seed), rule, seed) for seed in (1, 2, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, layer in prunable(model).items():
        fan_in = layer.weight[0].numel()
        wanted = {"kaiming": (2 / fan_in) ** 0.5, "ibp": (2 * torch.pi) ** 0.5 / fan_in}[rule]
        assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=5 / layer.weight.numel() ** 0.5)
        assert not layer.bias.any()
        assert torch.equal(layer.weight, again.get_submodule(name).weight)
        assert not torch.equal(layer.weight, other.get_submodule(name).weight)


def test_bounds_keep_their_size_under_the_initialisation_made_for_them_and_explode_without() -> None:
    x, y = torch.rand(8, *GREY, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.long)
    width = {}
    for rule in ("torch", "ibp"):
        model = initialise_(build_model("cnn_large", GREY, 10), rule, 0).eval()
        width[rule] = -float(ibp_margins(model, region(x, "linf", Fraction(1, 10)), y).detach().mean())
    assert width["torch"] > 1000
    assert width["ibp"] < 1
