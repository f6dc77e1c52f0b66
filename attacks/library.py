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

_ANY = ("linf", "l2")
# What each attack keeps small. FAB's l1 mode is not listed: it stops with an unbound variable.
NORMS: dict[str, tuple[str, ...]] = {
    "vanila": _ANY, "gn": _ANY,
    "apgd": _ANY, "apgdt": _ANY, "autoattack": _ANY, "fab": _ANY, "square": _ANY,
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
    "apgdt": {"steps": 100},
    "fab": {"steps": 100},
    "square": {"n_queries": 5000},
    "autoattack": {"steps": 100, "n_queries": 5000},
}

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
    (nor does gn) and may leave the ball; fab returns only what is inside it. Noise is drawn per batch, so verdicts of the
    stochastic attacks depend on the batch.

    Mended:
    - `autoattack` is the standard bundle (APGD-CE, APGD-T and FAB-T at 100 steps, Square at 5000 queries);
      the library's own runs 10 steps. Its params are `steps` and `n_queries`.
    - n_classes is the model's; a default `alpha` keeps its published ratio to eps (MIFGSM's ignores eps).
    - APGD, FAB and Square reset the global generators, AutoAttack takes the clock: both are shielded and seeded.
    - CW, EAD and UPGD compare logits with zero: they see logits shifted to be >= 0.
    - For CW, pixels are first moved 0.001 away from 0 and 1, where its tanh has no slope.
    - Printing, the device of a model without parameters, writes into the logits it was given.
    Not mended: CW does not search for c and its defaults are weak; tifgsm, pifgsm and pifgsmpp take RGB images only;
    a model in float64 is not supported.

    Raises KeyError for an unknown attack; ValueError for a norm the attack does not take, an unknown parameter, or too
    few classes for a DLR loss (4 for apgdt and autoattack, 3 for loss "dlr"). Kim 2020, arXiv 2010.01950; AutoAttack:
    Croce and Hein 2020, arXiv 2003.01690.
    """

    norm: str = "linf"
    eps: Fraction
    attack: str
    params: tuple[tuple[str, object], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
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
        with _untouched(model), _own_randomness(self.seed), torch.enable_grad(), silence:
            attack = self._build(torchattacks, logits, x)
            attack.set_device(x.device)
            x_adv = attack(start.clone(), y).detach().to(x.dtype)
        if start is not x:
            unmoved = (x_adv == start).flatten(1).all(dim=1)
            x_adv = torch.where(unmoved.view(-1, *[1] * (x.dim() - 1)), x, x_adv)
        return torch.where(torch.isfinite(x_adv), x_adv, x)

    def _build(self, torchattacks: ModuleType, model: nn.Module, x: Tensor) -> Any:
        with torch.no_grad():
            n_classes = int(model(x[:1]).shape[1])
        params = {key: _number(value) for key, value in self.params}
        self._check_classes(n_classes, params)
        if self.attack == "autoattack":
            return self._bundle(torchattacks, model, n_classes, **params)
        build = _attack_type(torchattacks, self.attack)
        takes = inspect.signature(build).parameters
        radius = float(self.eps)
        ours = {"eps": radius, "max_epsilon": radius, "norm": _norm_name(self.norm), "seed": self.seed}
        ours |= {"n_classes": n_classes}
        if "alpha" in takes and "eps" in takes:
            ours["alpha"] = radius * takes["alpha"].default / takes["eps"].default
        return build(model, **{**{key: value for key, value in ours.items() if key in takes}, **params})

    def _bundle(self, torchattacks: ModuleType, model: nn.Module, n_classes: int, steps: int, n_queries: int) -> Any:
        ball = {"norm": _norm_name(self.norm), "eps": float(self.eps), "seed": self.seed}
        return torchattacks.MultiAttack(
            [
                torchattacks.APGD(model, **ball, steps=steps, loss="ce"),
                torchattacks.APGDT(model, **ball, steps=steps, n_classes=n_classes),
                torchattacks.FAB(model, **ball, steps=steps, n_classes=n_classes, multi_targeted=True),
                torchattacks.Square(model, **ball, n_queries=n_queries),
            ]
        )

    def _check_params(self, given: Mapping[str, object]) -> None:
        if self.attack == "autoattack":
            known = set(STRENGTH["autoattack"])
        else:
            known = set(inspect.signature(_attack_type(_torchattacks(self.attack), self.attack)).parameters)
        for key in given:
            if key not in known - _OWN_FIELDS:
                takes = ", ".join(sorted(known - _OWN_FIELDS)) or "none"
                raise ValueError(f"attack {self.attack!r} has no parameter {key!r}: it takes {takes}")

    def _check_classes(self, n_classes: int, params: Mapping[str, object]) -> None:
        needed = 4 if self.attack in ("apgdt", "autoattack") else 3 if params.get("loss") == "dlr" else 2
        if n_classes < needed:
            raise ValueError(
                f"attack {self.attack!r} needs {needed} classes for its DLR loss, the model has {n_classes}: "
                "use apgd with loss ce, fab and square by name"
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
def _untouched(model: nn.Module) -> Iterator[None]:
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


def _norm_name(norm: str) -> str:
    return {"linf": "Linf", "l2": "L2"}.get(norm, norm.upper())


def _number(value: object) -> Any:
    if isinstance(value, Fraction) or (isinstance(value, str) and re.fullmatch(r"\d+/\d+", value)):
        return float(Fraction(value))
    return value


def _tuple(value: object) -> object:
    return tuple(_tuple(entry) for entry in value) if isinstance(value, (list, tuple)) else value
