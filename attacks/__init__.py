"""Attacks propose adversarial examples; the caller projects, clamps, re-evaluates and decides.

`ATTACKS` holds what is written here; every attack class of torchattacks is known by its lower-case name besides
(`attack_class`, `attack_fields`). Where both have a name (`pgd`, `fgsm`) the one written here is meant; the library's
is reached as `torchattacks` with `attack = "pgd"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from fractions import Fraction
from typing import Protocol

from torch import Tensor, nn

from attacks import library
from attacks.autoattack import AutoAttack
from attacks.library import Library
from attacks.minimum_norm import DDN, FMN
from attacks.pgd import FGSM, PGD, TooFewClassesError
from attacks.wrm import WRM

__all__ = [
    "ATTACKS", "DDN", "FGSM", "FMN", "PGD", "WRM", "Attack", "AutoAttack", "Library", "TooFewClassesError", "attack_class",
    "attack_fields", "names",
]  # fmt: skip


class Attack(Protocol):
    """Returns x_adv of the shape of x, meant to lie in the ball of radius `eps` around x and in [0,1].

    The model is in eval mode, x is float32 [N,C,H,W] in [0,1], y int64 [N]. Nothing of the model is changed. Whether
    x_adv is inside the ball and misclassified is for the caller to find out.

    An attack may have besides: `cost`, about how many forward passes an image costs (cheap ones go first); `rest`, True where
    it is meant for images that nothing else has broken; `black_box`, True where it needs no gradients, None for a bundle of
    both; `label`, its name on a board.
    """

    @property
    def norm(self) -> str: ...

    @property
    def eps(self) -> Fraction: ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor: ...


ATTACKS: dict[str, type] = {
    "pgd": PGD,
    "fgsm": FGSM,
    "wrm": WRM,
    "ddn": DDN,
    "fmn": FMN,
    "autoattack": AutoAttack,
    "torchattacks": Library,
}


def names() -> list[str]:
    """Every name a suite may use, sorted: those of `ATTACKS` and those of torchattacks."""
    return sorted({*ATTACKS, *library.NORMS})


def attack_class(name: str) -> type:
    """The frozen dataclass behind a name; its fields are the attack's configuration. Raises KeyError if unknown."""
    if name in ATTACKS:
        return ATTACKS[name]
    if name in library.NORMS:
        return Library
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise KeyError(f"unknown attack {name!r}: {hint}known names are {', '.join(names())}")


def attack_fields(name: str, fields: Mapping[str, object]) -> dict[str, object]:
    """What `attack_class(name)` is built from, given the fields a suite writes next to the name.

    For a torchattacks name, `attack` is filled in and every field that `Library` does not have goes into `params`, so a
    suite says `name = "square", n_queries = 1000`. Raises KeyError if the name is unknown, TypeError if `params` is no
    mapping.
    """
    if attack_class(name) is not Library:
        return dict(fields)
    own = {field.name for field in dataclass_fields(Library)}
    kept = {key: value for key, value in fields.items() if key in own}
    extra = {key: value for key, value in fields.items() if key not in own}
    params = {**library.as_mapping(kept.get("params", ())), **extra}
    filled = {} if name in ATTACKS else {"attack": name}
    return {**kept, **filled, "params": library.frozen(params)}
