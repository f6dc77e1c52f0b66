"""Every attack class of torchattacks 3.5.1 by its lower-case name, with its traps closed."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attacks.pgd import TooFewClassesError, margin_loss

_ANY = ("linf", "l2")
# What each attack keeps small. FAB's l1 mode is not listed: it stops with an unbound variable. Nor is AutoAttack, which runs
# 10 steps: `attacks.autoattack` is the standard bundle.
NORMS: dict[str, tuple[str, ...]] = {
    "vanila": _ANY, "gn": _ANY,
    "apgd": _ANY, "apgdt": _ANY, "fab": _ANY, "square": _ANY,
    "bim": ("linf",), "difgsm": ("linf",), "eotpgd": ("linf",), "ffgsm": ("linf",), "fgsm": ("linf",),
    "jitter": ("linf",), "mifgsm": ("linf",), "nifgsm": ("linf",), "pgd": ("linf",), "pgdrs": ("linf",),
    "pifgsm": ("linf",), "pifgsmpp": ("linf",), "rfgsm": ("linf",), "sinifgsm": ("linf",), "spsa": ("linf",),
    "tifgsm": ("linf",), "tpgd": ("linf",), "upgd": ("linf",), "vmifgsm": ("linf",), "vnifgsm": ("linf",),
    "cw": ("l2",), "deepfool": ("l2",), "eaden": ("l2",), "pgdl2": ("l2",), "pgdrsl2": ("l2",),
    "eadl1": ("l1",),
    "jsma": ("l0",), "onepixel": ("l0",), "pixle": ("l0",), "sparsefool": ("l0",),
}  # fmt: skip

# Published strength where torchattacks' own default (10 steps) is weaker; `params` override it.
STRENGTH: dict[str, dict[str, object]] = {
    "apgd": {"steps": 100},
    "apgdt": {"steps": 100, "targets": 9},
    "fab": {"steps": 100, "targets": 9},
    "square": {"n_queries": 5000},
}

BLACK_BOX = ("square", "onepixel", "pixle", "spsa", "gn")  # attacks that ask for predictions only, never for gradients
_OWN_FIELDS = {"model", "norm", "eps", "max_epsilon", "seed", "n_classes"}
_COMPARES_WITH_ZERO = {"cw", "eaden", "eadl1", "upgd"}
_NUDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Library:
    """Returns the x_adv that torchattacks proposes; the model and every random generator are left as they were.

    x is float32 [N,C,H,W] in [0,1], y int64 [N]; the result is detached, finite and of x's type. The model is attacked
    in eval mode; modes per submodule, `requires_grad` and `.grad` come back even after an exception. `params` are the
    constructor's own arguments (a mapping, or pairs; "2/255" is a number), merged with `STRENGTH` and kept as pairs so
    that `repr` names them all.

    The caller projects: cw, deepfool, eaden and the l0 and l1 attacks look for the smallest perturbation, take no eps
    (nor does gn) and may leave the ball; fab returns only what is inside it.

    Mended:
    - n_classes is the model's; apgdt and fab (with multi_targeted) aim at the `targets` nearest classes, 9 as published; a
      default `alpha` keeps its published ratio to eps (MIFGSM's ignores eps).
    - In l2, APGDT steps all images of a batch by the first one's step size: here each has its own.
    - apgd also takes loss "margin", for networks of two classes.
    - APGD, FAB and Square reset the global generators: all are shielded and seeded. Noise on images is the same for every image
      of a batch, so that no image's answer depends on its neighbours (but see below).
    - CW, EAD and UPGD compare logits with zero: they see logits shifted to be >= 0.
    - For CW, pixels are first moved 0.001 away from 0 and 1, where its tanh has no slope.
    - Printing, the device of a model without parameters, writes into the logits it was given.
    Not mended: CW does not search for c and its defaults are weak; tifgsm, pifgsm and pifgsmpp take RGB images only; Square in
    l2 needs images of 5x5 pixels at least; jitter, onepixel, pgdrs, pgdrsl2, pixle and spsa depend on the batch; a model in
    float64 is not supported.

    Raises KeyError for an unknown attack; ValueError for a norm the attack does not take or an unknown parameter;
    TooFewClassesError when called for a DLR loss on too few classes (4 for apgdt, 3 for loss "dlr"). Kim 2020, arXiv 2010.01950.
    """

    norm: str = "linf"
    eps: Fraction
    attack: str
    params: tuple[tuple[str, object], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attack == "autoattack":
            raise KeyError("torchattacks' own autoattack runs 10 steps: ask for the standard bundle by the name autoattack alone")
        if self.attack not in NORMS:
            near = difflib.get_close_matches(self.attack, NORMS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise KeyError(f"torchattacks has no {self.attack!r}: {hint}known names are {', '.join(sorted(NORMS))}")
        if self.norm not in NORMS[self.attack]:
            takes = " or ".join(NORMS[self.attack])
            raise ValueError(f"attack {self.attack!r} works in {takes}, not in {self.norm!r}: ask for {takes}")
        if not isinstance(self.eps, Fraction):
            raise TypeError(f"eps must be an exact Fraction, got {self.eps!r}: write Fraction('8/255'), not a float")
        given = as_mapping(self.params)
        if given:
            self._check_params(given)
        object.__setattr__(self, "params", frozen({**STRENGTH.get(self.attack, {}), **given}))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        start = x.clamp(_NUDGE, 1 - _NUDGE) if self.attack == "cw" else x
        torchattacks = _torchattacks(self.attack)
        silence = contextlib.redirect_stdout(io.StringIO())
        logits = _Logits(model, shift=self.attack in _COMPARES_WITH_ZERO)
        with untouched(model), _own_randomness(self.seed), torch.enable_grad(), silence, _OneDrawForAll():
            attack = self._build(torchattacks, logits, x)
            attack.set_device(x.device)
            x_adv = attack(start.clone(), y).detach().to(x.dtype)
        if start is not x:
            unmoved = (x_adv == start).flatten(1).all(dim=1)
            x_adv = torch.where(unmoved.view(-1, *[1] * (x.dim() - 1)), x, x_adv)
        return torch.where(torch.isfinite(x_adv), x_adv, x)

    @property
    def black_box(self) -> bool:
        """Whether it asks for predictions only, so that masked gradients do not stop it."""
        return self.attack in BLACK_BOX

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs: queries, or three for each step and target."""
        takes = inspect.signature(_attack_type(_torchattacks(self.attack), self.attack)).parameters
        params = {key: one.default for key, one in takes.items()} | dict(self.params)
        steps, queries, targets = (params.get(name) for name in ("steps", "n_queries", "targets"))
        if isinstance(queries, int):
            return queries
        aims = targets if isinstance(targets, int) and (self.attack == "apgdt" or params.get("multi_targeted")) else 1
        return 1 if self.attack in ("vanila", "gn") else 3 * aims * (steps if isinstance(steps, int) else 1)

    def _build(self, torchattacks: ModuleType, model: nn.Module, x: Tensor) -> Any:
        with torch.no_grad():
            n_classes = int(model(x[:1]).shape[1])
        params = {key: _number(value) for key, value in self.params}
        self._check_classes(n_classes, params)
        build = _targeted(torchattacks) if self.attack == "apgdt" else _attack_type(torchattacks, self.attack)
        takes = inspect.signature(build).parameters
        radius = float(self.eps)
        ours = {"eps": radius, "max_epsilon": radius, "norm": _norm_name(self.norm), "seed": self.seed}
        ours |= {"n_classes": 1 + min(n_classes - 1, int(params.pop("targets", n_classes - 1)))}
        if "alpha" in takes and "eps" in takes:
            ours["alpha"] = radius * takes["alpha"].default / takes["eps"].default
        by_margin = self.attack == "apgd" and params.get("loss") == "margin"
        params |= {"loss": "dlr"} if by_margin else {}
        attack = build(model, **{**{key: value for key, value in ours.items() if key in takes}, **params})
        if by_margin:
            attack.dlr_loss = margin_loss
        return attack

    def _check_params(self, given: Mapping[str, object]) -> None:
        known = set(inspect.signature(_attack_type(_torchattacks(self.attack), self.attack)).parameters)
        known = known - _OWN_FIELDS | ({"targets"} if "n_classes" in known else set())
        for key in given:
            if key not in known:
                takes = ", ".join(sorted(known)) or "none"
                raise ValueError(f"attack {self.attack!r} has no parameter {key!r}: it takes {takes}")

    def _check_classes(self, n_classes: int, params: Mapping[str, object]) -> None:
        needed = 4 if self.attack == "apgdt" else 3 if params.get("loss") == "dlr" else 2
        if n_classes < needed:
            raise TooFewClassesError(
                f"attack {self.attack!r} needs {needed} classes for its DLR loss, the model has {n_classes}: "
                "use apgd with loss ce or margin"
            )


def as_mapping(params: object) -> dict[str, object]:
    """Params given as a mapping or as pairs, as a dict. Raises TypeError for anything else."""
    if isinstance(params, Mapping):
        return dict(params)
    if isinstance(params, (tuple, list)) and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in params):
        return {str(key): value for key, value in params}
    raise TypeError(f"params must be a mapping of the attack's own arguments, got {params!r}")


def frozen(params: Mapping[str, object]) -> tuple[tuple[str, object], ...]:
    """Params as hashable pairs sorted by name: lists become tuples."""
    return tuple((key, _tuple(params[key])) for key in sorted(params))


class _Logits(nn.Module):
    """The model's logits as a copy, on request shifted per image so that the smallest is zero (same predictions)."""

    def __init__(self, model: nn.Module, shift: bool) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if self.shift:
            return logits - logits.amin(dim=1, keepdim=True).detach()
        return logits.clone()  # Square writes into what it gets, which may be a view of its own image


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without parameter gradients; modes, `requires_grad` and `.grad` come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)  # several attacks call backward(): nothing can accumulate
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed, gradient in parameters:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


class _OneDrawForAll(TorchFunctionMode):
    """Noise for a batch of images [N, C, H, W] is drawn for one image and repeated: it does not depend on N."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rand, torch.randn) and len(args) == 1 and isinstance(args[0], tuple | list) and len(args[0]) == 4:
            return func((1, *args[0][1:]), **kwargs).repeat(args[0][0], 1, 1, 1)
        if func in (torch.rand_like, torch.randn_like) and args[0].dim() == 4 and len(args[0]):
            return func(args[0][:1], *args[1:], **kwargs).repeat(len(args[0]), 1, 1, 1)
        if func in (Tensor.uniform_, Tensor.normal_) and args[0].dim() == 4 and len(args[0]):
            return args[0].copy_(func(args[0][:1].clone(), *args[1:], **kwargs).expand_as(args[0]))
        return func(*args, **kwargs)


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    # pixle and onepixel draw from numpy's global generator, which torchattacks has loaded by now
    numpy_random = sys.modules["numpy"].random
    state = numpy_random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        numpy_random.seed(seed % 2**32)
        try:
            yield
        finally:
            numpy_random.set_state(state)


def _torchattacks(attack: str) -> ModuleType:
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(f"attack {attack!r} needs torchattacks: pip install --no-deps -r requirements-nodeps.txt") from error
    return torchattacks


def _attack_type(torchattacks: ModuleType, attack: str) -> type:
    spelled = {name.lower(): name for name in torchattacks.__all__}
    found: type = getattr(torchattacks, spelled[attack])
    return found


def _targeted(torchattacks: ModuleType) -> type:
    """APGDT with the ascent of APGD, which steps every image by its own step size."""

    class Targeted(torchattacks.APGDT):  # type: ignore[name-defined]
        loss = "dlr"

        def attack_single_run(self, x: Tensor, y: Tensor) -> Any:
            with torch.no_grad():
                goal = self.get_logits(x).sort(dim=1)[1][:, -self.target_class]
            self.dlr_loss = lambda logits, y: self.dlr_loss_targeted(logits, y, goal)
            return torchattacks.APGD.attack_single_run(self, x, y)

    return Targeted


def _norm_name(norm: str) -> str:
    return {"linf": "Linf", "l2": "L2"}.get(norm, norm.upper())


def _number(value: object) -> Any:
    if isinstance(value, Fraction) or (isinstance(value, str) and re.fullmatch(r"\d+/\d+", value)):
        return float(Fraction(value))
    return value


def _tuple(value: object) -> object:
    return tuple(_tuple(entry) for entry in value) if isinstance(value, (list, tuple)) else value
