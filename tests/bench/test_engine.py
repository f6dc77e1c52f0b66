"""The sparse engine against float64: as close as dense float32 is, in every batch the same, and dense where it cannot be."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.library import Library
from attacks.pgd import PGD
from bench.engine import Accelerated, accelerated, kernel, module
from bench.models import ARCHITECTURES, build_model
from verifiers import IBP, Smoothing

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 2.0**-24


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    try:
        kernel.load(kernel.variant_here())
    except kernel.NoKernelError as reason:
        pytest.skip(f"no kernel here: {reason}")


# ---- networks -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prune_(net: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Random masks, biases, statistics and scales, so that nothing cancels or is the identity; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.normal_(0, (2 / (density * layer.weight[0].numel())) ** 0.5, generator=generator)
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < density)
            if layer.bias is not None:
                layer.bias.uniform_(-0.2, 0.2, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            for value, low, high in ((layer.running_mean, -0.2, 0.2), (layer.running_var, 0.5, 2.0),
                                     (layer.weight, 0.5, 1.5), (layer.bias, -0.2, 0.2)):  # fmt: skip
                value.uniform_(low, high, generator=generator)
    return net.eval().requires_grad_(False)


def pruned(name: str, density: float, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    channels = shape[0]
    return prune_(build_model(name, shape, 10, mean=[0.4] * channels, std=[0.2] * channels), density)


class Random(nn.Module):
    """Convolutions, pools, sums and concatenations drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)
        self.shape = (self._one(1, 2, 3, 4), self._one(5, 8, 11, 16), self._one(5, 7, 9, 18))
        self.layers, self.plan = nn.ModuleList(), list[tuple[str, int]]()
        channels, (_, height, width) = self.shape[0], self.shape
        while len(self.plan) < 6:
            kind = ("convolve", "convolve", "pool", "sum", "join", "norm")[self._one(0, 1, 2, 3, 4, 5)]
            if min(height, width) < 5:
                break
            layer = self._layer(kind, channels, min(height, width))
            out = layer(torch.zeros(2, channels, height, width)).shape[1:]
            self.layers.append(layer)
            self.plan.append((kind, self._one(0, 1)))
            channels, height, width = out[0] + (channels if kind == "join" else 0), *out[1:]
        self.head = nn.Linear(channels * height * width, 5)

    def _one(self, *choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.draw))]

    def _layer(self, kind: str, channels: int, side: int) -> nn.Module:
        if kind == "convolve":
            groups = channels if self._one(0, 0, 1) else 1
            size, dilation = (self._one(1, 2, 3, 5), self._one(1, 3)), self._one(1, 1, 2 if side >= 9 else 1)
            return nn.Conv2d(channels, groups * self._one(1, 2, 4), size, stride=(self._one(1, 1, 2, 3), self._one(1, 2)),
                             padding=(self._one(0, 1, 2), self._one(0, 1)), dilation=dilation, groups=groups,
                             bias=bool(self._one(0, 1)))  # fmt: skip
        if kind == "pool":
            size, stride, pad, ceil = self._one(2, 3), self._one(1, 2, 3), self._one(0, 1), bool(self._one(0, 1))
            average = nn.AvgPool2d(size, stride, pad, ceil, bool(self._one(0, 1)))
            adaptive = nn.AdaptiveAvgPool2d((self._one(1, 2, 3), self._one(1, 3)))
            return (nn.MaxPool2d(size, stride, pad, ceil_mode=ceil), average, adaptive)[self._one(0, 1, 2)]
        return nn.BatchNorm2d(channels) if kind == "norm" else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer, (kind, active) in zip(self.layers, self.plan, strict=True):
            out = layer(x)
            if kind == "sum":
                out = out + x
            if kind == "join":
                out = torch.cat([F.relu(out), x], 1)
            x = F.relu(out) if active else out
        logits: Tensor = self.head(x.flatten(1))
        return logits


# ---- as close to float64 as dense float32 is --------------------------------------------------------------------------------


def both(net: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a fixed combination of them."""
    x = x.clone().requires_grad_()
    logits = net(x)
    weights = torch.linspace(-1, 1.3, logits[0].numel(), dtype=x.dtype).view_as(logits[0])
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), x)[0]


def nearest_tie(net: nn.Module, x: Tensor) -> Tensor:
    """Per image, how near float64 values come to where a gradient jumps, in shares of the largest value there."""
    found: list[Tensor] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (F.relu, torch.relu, Tensor.relu):
                value = args[0].detach().flatten(1).abs()
                found.append(value.min(1).values / value.max().clamp(min=1e-300))
            if func is torch.max_pool2d:
                found.append(_nearest_maxima(*args[:4]))
            return func(*args, **(kwargs or {}))

    with Watch():
        net(x)
    return torch.stack(found).min(0).values if found else torch.full((len(x),), torch.inf, dtype=x.dtype)


def _nearest_maxima(value: Tensor, size: int, stride: int, pad: int) -> Tensor:
    more = F.pad(value.detach(), (pad, pad + stride, pad, pad + stride), value=-torch.inf)  # windows that ceil_mode adds, too
    best = more.unfold(2, size, stride).unfold(3, size, stride).flatten(4).topk(2).values
    near = (best[..., 0] - best[..., 1]).flatten(1).nan_to_num(torch.inf)
    return near.masked_fill(near == 0, torch.inf).min(1).values / value.abs().max()  # equal ones: zeros, that ReLUs made


def check_against_float64(net: nn.Module, engine: Accelerated, x: Tensor, near: float = 1e-6) -> int:
    """The statement of docs/engine.md, asserted; returns how many images were too near a tie to speak of gradients."""
    assert engine.path.startswith("engine"), engine.reason
    double = copy.deepcopy(net).double()
    (exact, slope), (dense, dense_slope), (ours, our_slope) = both(double, x.double()), both(net, x), both(engine, x)
    assert ours.shape == dense.shape
    assert our_slope.shape == x.shape
    assert (ours - exact).norm() <= 4 * max(float((dense - exact).norm()), ROUNDING * float(exact.norm()))
    clear = nearest_tie(double, x.double()) > near
    error, theirs, size = ((one[clear]).norm() for one in (our_slope - slope, dense_slope - slope, slope))
    assert error <= 4 * max(float(theirs), ROUNDING * float(size))
    sure = (slope.abs() > 1e-5 * slope.abs().max()) & clear.view(-1, 1, 1, 1)
    assert torch.equal(our_slope.sign()[sure].double(), slope.sign()[sure])
    return int((~clear).sum())


@pytest.mark.parametrize("seed", range(45))
def test_random_networks_are_as_near_to_float64_as_dense_float32(seed: int) -> None:
    """Shapes, strides, paddings, dilations, groups, pools, sums, concatenations, densities, batch sizes."""
    net = Random(seed)
    prune_(net, (0.05, 0.15, 0.3, 0.45)[seed % 4], seed)
    x = torch.rand((1, 5, 16, 19, 33)[seed % 5], *net.shape, generator=torch.Generator().manual_seed(seed))
    engine = accelerated(net, x, path="engine")
    if not engine.path.startswith("engine"):
        assert "remain" in engine.reason  # few weights: by chance most of them were kept
        return
    check_against_float64(net, engine, x)


SMALL = {name: f"{name}@1/8" for name in ARCHITECTURES if name not in ("mlp", "lenet", "cnn_small", "cnn_large")}
SMALL |= {"mlp": "mlp", "lenet": "lenet", "cnn_small": "cnn_small", "cnn_large": "cnn_large@1/4"}
LONG = ("resnet101", "resnet50_imagenet", "wrn_28_10", "wrn_28_4", "wrn_28_2", "resnet34", "resnet50", "googlenet")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in LONG])
def test_the_architectures_are_compiled_and_as_near_as_dense(name: str) -> None:
    net = pruned(SMALL[name], 0.1, (3, 16, 16))
    x = torch.rand(18, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert check_against_float64(net, accelerated(net, x, path="engine"), x) <= len(x) // 2


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.02, 0.2])
@pytest.mark.parametrize("name", LONG)
def test_the_deep_architectures_are_compiled_and_as_near_as_dense(name: str, density: float) -> None:
    side = 64 if name.endswith("imagenet") else 16
    net = pruned(SMALL[name], density, (3, side, side))
    x = torch.rand(18, 3, side, side, generator=torch.Generator().manual_seed(1))
    check_against_float64(net, accelerated(net, x, path="engine"), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "mobilenet_v2", "cnn_large"])
def test_at_full_width_logits_are_as_near_as_dense(name: str) -> None:
    """With so many values, some ReLU is always near a tie: the statement about gradients is for smaller networks."""
    net, x = pruned(name, 0.05), torch.rand(20, 3, 32, 32)
    check_against_float64(net, accelerated(net, x, path="engine"), x)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in ("avx2", "portable") if name != kernel.variant_here()])
@pytest.mark.parametrize("seed", range(20))
def test_the_other_kernels_are_as_near_as_dense(monkeypatch: pytest.MonkeyPatch, variant: str, seed: int) -> None:
    if variant == "avx2" and kernel.variant_here() == "portable":
        pytest.skip("the processor has no AVX2")
    monkeypatch.setattr(module, "variant_here", lambda: variant)
    net = prune_(Random(seed), 0.1, seed)
    x = torch.rand(19, *cast(Random, net).shape)
    engine = accelerated(net, x, path="engine")
    if engine.path != "dense":
        assert engine.path == f"engine-{variant}"
        check_against_float64(net, engine, x)


def test_predictions_differ_only_where_the_margin_is_below_the_rounding_allowance() -> None:
    net = pruned("resnet18@1/8", 0.05, (3, 16, 16))
    x = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    engine = accelerated(net, x, path="engine")
    logits, ours = net(x), engine(x)
    best = logits.topk(2).values
    near = best[:, 0] - best[:, 1] < 1e-5 * logits.abs().max()
    other = logits.argmax(1) != ours.argmax(1)
    assert not bool((other & ~near).any())
    assert int(near.sum()) <= 8


# ---- the same in every batch ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return pruned("resnet18@1/8", 0.1, (3, 16, 16))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def engine(net: nn.Module, x: Tensor) -> Accelerated:
    made = accelerated(net, x, path="engine")
    assert made.path == f"engine-{kernel.variant_here()}"
    return made


def check_bits_in_batches(engine: Accelerated, x: Tensor) -> None:
    assert engine.path.startswith("engine"), engine.reason
    logits, slope = both(engine, x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for part in (*order[:22].split(1)[:3], order[:7], order[3:19], order[2:35], order):
        some, some_slope = both(engine, x[part])
        assert torch.equal(some, logits[part])
        assert torch.equal(some_slope, slope[part])
        with torch.no_grad():
            assert torch.equal(engine(x[part]), logits[part])


def test_an_image_has_the_same_bits_in_every_batch(engine: Accelerated, x: Tensor) -> None:
    check_bits_in_batches(engine, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet@1/8", "mobilenet_v2@1/8", "wrn_16_8@1/4", "vgg16@1/4", "lenet"])
def test_an_image_has_the_same_bits_in_every_batch_of_other_networks(name: str, x: Tensor) -> None:
    check_bits_in_batches(accelerated(pruned(name, 0.1, (3, 16, 16)), x, path="engine"), x)


def test_an_image_is_not_touched_by_what_its_neighbours_hold(engine: Accelerated, x: Tensor) -> None:
    spoilt = x[:16].clone()
    spoilt[3], spoilt[7], spoilt[8] = torch.nan, torch.inf, 1e38
    with torch.no_grad():
        got, want = engine(spoilt), engine(x[:16])
    rest = [k for k in range(16) if k not in (3, 7, 8)]
    assert torch.equal(got[rest], want[rest])
    assert bool(got[3].isnan().all())


def test_threads_share_a_program(engine: Accelerated, x: Tensor) -> None:
    want = both(engine, x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: both(engine, x), range(12)):
            assert all(map(torch.equal, got, want))


def test_two_graphs_at_once_and_a_graph_used_twice(engine: Accelerated, x: Tensor) -> None:
    a, b = (x[part].clone().requires_grad_() for part in (slice(0, 17), slice(17, 40)))
    first, second = engine(a), engine(b)
    for k in (0, 4, 0):
        for logits, image, part in ((first, a, slice(0, 17)), (second, b, slice(17, 40))):
            (slope,) = torch.autograd.grad(logits[:, k].sum(), image, retain_graph=True)
            alone = x[part].clone().requires_grad_()
            assert torch.equal(slope, torch.autograd.grad(engine(alone)[:, k].sum(), alone)[0])


CHILD = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from bench.engine import accelerated
net, x = torch.load({path!r}, weights_only=False)
engine = accelerated(net, x, path="engine")
x = x.requires_grad_()
logits = engine(x)
slope = torch.autograd.grad(logits.sum(), x)[0]
print(engine.path, *(one.detach().view(torch.int32).sum().item() for one in (logits, slope)))
"""


@pytest.mark.slow
def test_processes_that_start_without_a_kernel_at_the_same_time_agree(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    torch.save((net, x), tmp_path / "net.pt")
    code = CHILD.format(root=str(ROOT), path=str(tmp_path / "net.pt"))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=600)[0] for child in children]
    assert said[0] == said[1]
    assert said[0].startswith("engine")
    assert [path.suffix for path in (tmp_path / "cache/sparsecert/engine").iterdir()] == [".so"]


# ---- where a gradient is not defined, as torch has it -------------------------------------------------------------------------


def test_of_equal_maxima_the_first_takes_the_gradient_and_a_relu_at_zero_lets_none_through() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Conv2d(2, 2, 1, bias=False)
            self.same.weight = nn.Parameter(torch.eye(2).view(2, 2, 1, 1))
            self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 2)
            self.head.weight = nn.Parameter(torch.eye(8)[[0, 5]])

        def forward(self, x: Tensor) -> Tensor:
            value: Tensor = self.head(self.pool(self.same(x)).flatten(1))
            return value + F.relu(self.head(F.relu(self.pool(self.same(x))).flatten(1)))

    net = Net().eval().requires_grad_(False)
    x = torch.randint(3, (64, 2, 4, 4), generator=torch.Generator().manual_seed(0)) / 2
    engine = accelerated(net, x, path="engine")
    assert engine.path.startswith("engine"), engine.reason
    assert all(map(torch.equal, both(engine, x), both(net, x)))


# ---- those who use it do not know ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(net: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, net(x).argmax(1))


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 255)), ("l2", Fraction(1, 20))])
def test_pgd_breaks_the_same_images(
    net: nn.Module, engine: Accelerated, x: Tensor, labels: Tensor, norm: str, eps: Fraction
) -> None:
    attack = PGD(norm=norm, eps=eps, steps=8)
    broken = [net(attack(one, x, labels)).argmax(1) != labels for one in (net, engine)]
    assert torch.equal(*broken)
    assert 0 < int(broken[0].sum()) < len(x)


def test_a_library_attack_runs_on_it(net: nn.Module, engine: Accelerated, x: Tensor, labels: Tensor) -> None:
    attack = Library(norm="linf", eps=Fraction(1, 255), attack="apgd", params=(("steps", 5),))
    broken = [net(attack(one, x, labels)).argmax(1) != labels for one in (net, engine)]
    assert torch.equal(*broken)


def test_smoothing_counts_the_same_draws(net: nn.Module, engine: Accelerated, x: Tensor, labels: Tensor) -> None:
    smoothing = Smoothing(n=300, sigma=0.1)
    dense, ours = (smoothing(one, x[:4], labels[:4]) for one in (net, engine))
    assert int((dense.details["hits"] - ours.details["hits"]).abs().max()) <= 1  # a draw at a tie may change sides


def test_verifiers_get_the_plain_network_and_its_parameters_are_in_sight(net: nn.Module, engine: Accelerated, x: Tensor) -> None:
    state = engine.plain.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    labels = net(x[:3]).argmax(1)
    proofs = [IBP("linf", Fraction(1, 1000))(one, x[:3], labels) for one in (net, engine.plain)]
    assert torch.equal(proofs[0].margin, proofs[1].margin)


# ---- and where it cannot be, dense --------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.first, self.function, self.head = nn.Conv2d(3, 40, 3, padding=1, **options), function, nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.function(self.first(x)).mean((2, 3)))
        return logits


def _beyond_float32(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = torch.inf
    return net


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a dense network": (lambda: Odd(F.relu), "of the weights remain"),
    "a function without a rule": (lambda: prune_(Odd(torch.sigmoid), 0.1), "no rule for sigmoid"),
    "a product": (lambda: prune_(Odd(lambda x: x * 2), 0.1), "no rule for mul"),
    "a sum with a number": (lambda: prune_(Odd(lambda x: x + 1), 0.1), "sum of anything but two values"),
    "another padding": (lambda: prune_(Odd(F.relu, padding_mode="reflect"), 0.1), "padding mode 'reflect'"),
    "float64": (lambda: prune_(Odd(F.relu), 0.1).double(), "not float32"),
    "an infinite weight": (lambda: _beyond_float32(prune_(Odd(F.relu), 0.1)), "not finite"),
    "a forward that cannot be traced": (lambda: prune_(Odd(lambda x: x if x.sum() > 0 else -x), 0.1), "traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_answered_by_the_dense_network_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    net, x = make().eval(), torch.rand(3, 3, 6, 6)
    made = accelerated(net, x)
    assert made.path == "dense"
    assert reason in made.reason
    x = x.to(next(net.parameters()).dtype)
    assert torch.equal(made(x).nan_to_num(), net(x).nan_to_num())


def test_without_a_compiler_everything_still_works(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel.load.cache_clear()
    monkeypatch.setattr(kernel, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = accelerated(net, x)
    kernel.load.cache_clear()
    assert made.path == "dense"
    assert "no C++ compiler found" in made.reason
    assert torch.equal(made(x), net(x))


def test_a_kernel_that_others_could_have_put_there_is_not_loaded(tmp_path: Path) -> None:
    open_to_all = tmp_path / "engine"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(OSError, match="can be written by others"):
        kernel._private(open_to_all)


def test_the_compilers_own_words_are_the_reason(tmp_path: Path) -> None:
    with pytest.raises(kernel.NoKernelError, match="no-such-option"):
        kernel.compile_kernel(tmp_path / "kernel.so", "portable", ["--no-such-option"])


def test_the_faster_one_is_taken_and_the_measurement_is_remembered(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net = pruned("cnn_small", 0.1, (3, 16, 16))
    seconds: Iterator[float] = iter([2.0, 1.0] * 3)
    monkeypatch.setattr(module, "_measured", {})
    monkeypatch.setattr(module, "_seconds", lambda model, block: next(seconds))
    made = accelerated(net, x)
    assert made.path.startswith("engine")
    assert made.speeds == module.Speeds(2.0, 1.0)
    assert accelerated(net, x).speeds == made.speeds
    other = copy.deepcopy(net)
    next(other.parameters()).data.mul_(0.5)
    seconds = iter([1.0, 2.0] * 3)
    assert accelerated(other, x).path == "dense"
    assert accelerated(other, x, path="engine").path.startswith("engine")


def test_what_was_not_compiled_for_is_answered_by_the_plain_network(net: nn.Module, engine: Accelerated, x: Tensor) -> None:
    assert torch.equal(engine(x[:0]), net(x[:0]))
    larger = torch.rand(2, 3, 20, 20)
    assert torch.equal(engine(larger), net(larger))
    double = copy.deepcopy(engine).double()
    assert torch.equal(double(x.double()), copy.deepcopy(net).double()(x.double()))


def test_it_is_a_snapshot_and_a_changed_snapshot_is_not_answered_by_the_old_program(x: Tensor) -> None:
    mine = pruned("cnn_small", 0.1, (3, 16, 16))
    engine = accelerated(mine, x, path="engine")
    before = engine(x)
    with torch.no_grad():
        next(mine.parameters()).zero_()
    assert torch.equal(engine(x), before)
    twin = copy.deepcopy(engine)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        next(engine.plain.parameters()).mul_(2)
    assert torch.equal(engine(x), engine.plain(x))
    assert torch.equal(twin(x), before)
    assert not engine.train().training


def test_the_example_of_the_page_works_as_it_stands() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/engine.md").read_text(), re.S)
    exec(code, {})


# ---- memory -------------------------------------------------------------------------------------------------------------------

SANITIZED = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import bench.engine.program as program
from bench.engine.layers import read, NoProgramError
from bench.engine.kernel import _declared
import ctypes
library = _declared(ctypes.CDLL({library!r}))
program.load = lambda variant: library
from test_engine import Random, pruned, prune_
done = 0
nets = [prune_(Random(seed), 0.2, seed) for seed in range(25)] + [pruned("googlenet@1/16", 0.2, (3, 16, 16))]
for net in nets:
    shape = getattr(net, "shape", (3, 16, 16))
    x = torch.rand(19, *shape)
    try:
        made = program.Program(read(net, x), "asked for")
    except NoProgramError:
        continue
    logits, record = made.forward(x, True)
    made.backward(torch.ones_like(logits), record)
    made.forward(x[:3].contiguous(), False)
    done += 1
print("done", done)
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", [kernel.variant_here(), "portable"])
def test_no_kernel_reads_or_writes_outside_its_memory(variant: str, tmp_path: Path) -> None:
    """Every buffer has an allocation of its own, so that the address sanitizer sees a step beyond any of them."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    kernel.compile_kernel(tmp_path / "kernel.so", variant, flags)
    runtime = subprocess.run([*kernel.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    code = SANITIZED.format(root=str(ROOT), tests=str(Path(__file__).parent), library=str(tmp_path / "kernel.so"))
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[1]) > 15
