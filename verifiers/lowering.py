"""Any supported network as a plain core graph that linear relaxations are right on.

auto-LiRPA 0.3 is silently wrong on some graphs (docs/decisions/0003-auto-lirpa.md), so it only ever sees what this module
returns: baked weights, no Dropout or Identity, the normalisation moved out of the graph.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .graph import name_of, operation, trace
from .normalise import Normalize
from .pooling import calls_as_layers, pair, pair_of_output, plain_pool, pools_as_layers
from .proof import SelfRefutedError, UnsupportedNetworkError, require_finite
from .rewrites import Editor, clips_as_relus, fold_batchnorms, make_plain, simplify

CORE_LAYERS = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
SUMS = (operator.add, torch.add)
CORE_CALLS = (operator.add, torch.add, torch.relu, F.relu, torch.flatten, torch.cat, "flatten", "relu")


@dataclass(frozen=True)
class Lowered:
    """`network(x - shift)` equals the original network at x; `steps` says what was done."""

    network: fx.GraphModule
    shift: Tensor | None
    steps: tuple[str, ...]
    patches_are_sound: bool
    starts_affine: bool

    def move(self, x: Tensor) -> Tensor:
        """The pixels x as the lowered network's input."""
        return x if self.shift is None else x - self.shift.to(x)


def simplified(model: nn.Module, example: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """The network in forms that interval bounds have rules for, equal in exact arithmetic, and what was done to it.

    view and reshape to [N, -1] become Flatten, means over the pixels AdaptiveAvgPool2d(1), BatchNorm1d goes into the Linear
    before it, dropouts go. Where nothing of the kind is there, the network itself is returned.
    """
    steps: list[str] = []
    module = flat_copy(model)
    simplify(Editor(module, example[:2], steps))
    return (module, tuple(steps)) if steps else (model, ())


def lower(model: nn.Module, example: Tensor, maxima_as_relus: bool = False) -> Lowered:
    """The network as a core graph, equal to the original on `example` and random inputs (checked in float64).

    Max pooling whose windows lie side by side stays as it is unless `maxima_as_relus`. Raises UnsupportedNetworkError, naming
    the operation, for whatever has no sound linear relaxation here.
    """
    if any(is_parametrized(layer) for layer in model.modules()):
        raise UnsupportedNetworkError("the network still has parametrizations attached; bake its masks first")
    steps: list[str] = []
    module = flat_copy(model)
    edit = Editor(module, example[:2], steps)
    simplify(edit)
    _drop_layers_that_do_nothing(module, steps)
    edit.refresh()
    calls_as_layers(edit)
    pools_as_layers(edit, maxima_as_relus)
    clips_as_relus(edit)
    fold_batchnorms(edit, nn.Conv2d, nn.BatchNorm2d)
    make_plain(edit)
    shift = _move_normalisation_out(module, steps)
    edit.refresh()
    _refuse_what_is_not_core(module)
    lowered = Lowered(module.eval(), shift, tuple(steps), _patches_are_sound(module), _starts_affine(module))
    _check_equal(model, lowered, example)
    return lowered


def flat_copy(model: nn.Module) -> fx.GraphModule:
    """A copy whose forward is the model's traced graph."""
    plain = copy.deepcopy(model).eval()
    graph = fx.Graph()
    graph.output(graph.graph_copy(trace(plain), {}))
    return fx.GraphModule(plain, graph)


def _bypass(module: fx.GraphModule, node: fx.Node) -> None:
    (source,) = node.all_input_nodes
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)


def _drop_layers_that_do_nothing(module: fx.GraphModule, steps: list[str]) -> None:
    layers = dict(module.named_modules())
    for node in list(module.graph.nodes):
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Dropout | nn.Identity):
            _bypass(module, node)
            steps.append(f"dropped {type(layer).__name__} {node.target}")


def _move_normalisation_out(module: fx.GraphModule, steps: list[str]) -> Tensor | None:
    """(x - mean) / std before the first layer: the ball is translated by mean, 1/std goes into the first layer's weights."""
    layers = dict(module.named_modules())
    nodes = [n for n in module.graph.nodes if n.op == "call_module" and isinstance(layers[str(n.target)], Normalize)]
    if not nodes:
        return None
    if len(nodes) > 1 or nodes[0].args[0].op != "placeholder":
        raise UnsupportedNetworkError("a normalisation is supported as the network's first layer only")
    (node,) = nodes
    layer = layers[str(node.target)]
    if bool((layer.std != 1).any()):
        _fold_scale(module, layers, node, layer.std)
        steps.append("folded 1/std of the normalisation into the first layer")
    _bypass(module, node)
    steps.append("moved the mean of the normalisation out of the graph (the ball is translated)")
    return layer.mean


def _fold_scale(module: fx.GraphModule, layers: dict[str, nn.Module], node: fx.Node, std: Tensor) -> None:
    users = list(node.users)
    flat = [user for user in users if user.op == "call_module" and isinstance(layers[str(user.target)], nn.Flatten)]
    firsts = [user for user in users if user not in flat] + [user for f in flat for user in f.users]
    for user in firsts:
        first = layers.get(str(user.target)) if user.op == "call_module" else None
        if first is not None and sum(other.target == user.target for other in module.graph.nodes) > 1:
            raise UnsupportedNetworkError(f"the normalisation feeds {user.target}, which the network uses more than once")
        if isinstance(first, nn.Conv2d) and first.groups == 1:
            scale = std.view(1, -1, 1, 1)
        elif isinstance(first, nn.Linear):
            channels = std.flatten()
            scale = channels.repeat_interleave(first.in_features // len(channels)).view(1, -1)
        else:
            raise UnsupportedNetworkError(f"the normalisation feeds {user.name}; it can be folded into Conv2d or Linear only")
        first.weight = nn.Parameter((first.weight.double() / scale.double()).to(first.weight.dtype), requires_grad=False)


def _refuse_what_is_not_core(module: fx.GraphModule) -> None:
    layers = dict(module.named_modules())
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            raise UnsupportedNetworkError(f"no linear relaxation for the constant {node.target!r} inside the forward")
        kind = operation(node, layers)
        if node.op == "call_module":
            layer = layers[str(node.target)]
            if kind in CORE_LAYERS or (kind in POOLS and plain_pool(layer)) or _global_average(layer):
                continue
        elif kind in CORE_CALLS and (kind not in SUMS or _plain_sum(node)):
            continue
        raise UnsupportedNetworkError(f"no sound linear relaxation for {name_of(kind)} ({node.name}); `ibp` may bound it")


def _plain_sum(node: fx.Node) -> bool:
    """Two values, no constants, no factor."""
    return len(node.args) == 2 and all(isinstance(one, fx.Node) for one in node.args) and not node.kwargs


def _starts_affine(module: fx.GraphModule) -> bool:
    """Whether the input reaches convolutions and linear layers only, at most flattened on the way."""
    layers = dict(module.named_modules())
    (image,) = (node for node in module.graph.nodes if node.op == "placeholder")
    users = list(image.users)
    for node in users:
        kind = operation(node, layers)
        if kind in (nn.Flatten, torch.flatten, "flatten"):
            users.extend(node.users)
        elif kind not in (nn.Conv2d, nn.Linear):
            return False
    return True


def _global_average(layer: nn.Module) -> bool:
    return isinstance(layer, nn.AdaptiveAvgPool2d) and pair_of_output(layer) == (1, 1)


def _patches_are_sound(module: fx.GraphModule) -> bool:
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    pools = any(isinstance(layer, POOLS) for layer in module.modules())
    square = all(
        c.groups == 1 and pair(c.dilation) == (1, 1) and c.kernel_size[0] == c.kernel_size[1] for c in convolutions
    )
    return bool(convolutions) and square and not pools


def _check_equal(model: nn.Module, lowered: Lowered, example: Tensor) -> None:
    network = copy.deepcopy(lowered.network).double()
    # a float32 network's folded weights were rounded to float32, so the two agree to that precision only
    share = 1e-5 if example.dtype == torch.float32 else 1e-9
    require_same_function(model, lambda x: network(lowered.move(x)), example, share, "lowered")


@torch.no_grad()
def require_same_function(
    model: nn.Module, other: Callable[[Tensor], Tensor], example: Tensor, share: float, name: str, size: float = 1.0
) -> None:
    """Raises SelfRefutedError where the two differ, in float64, by more than the `share` of the largest logit, or of `size`.

    On the images, on random ones, and on values far outside [0,1], where clipping and padding show; in two batch sizes.
    """
    original = copy.deepcopy(model).double().eval()
    generator = torch.Generator(example.device).manual_seed(0)
    pixels = torch.rand(7, *example.shape[1:], dtype=torch.float64, device=example.device, generator=generator)
    for x in (torch.cat([example.double(), pixels[:4]]), 40 * (pixels[4:] - 0.5)):
        want, got = original(x), other(x)
        require_finite(x, want)
        scale = max(size, float(want.abs().max()))
        if want.shape != got.shape or not float((want - got).abs().max()) <= share * scale:
            raise SelfRefutedError(f"the {name} network differs from the original; please report this network")
