"""Stored forms of a weight: factors (ATMC, low rank) and codes into a book, as plain named tensors, written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import UserError

PARTS = {"atmc": ("U", "V", "C"), "lowrank": ("U", "V"), "plain": ("W",)}
TITLES = {"atmc": "ATMC factors U, V, C", "lowrank": "low-rank factors U, V", "plain": "codes into a book"}
BOOK = 256  # distinct non-zero values that a code book may hold
FACTOR = re.compile(r"((?:.*\.)?weight)\.(atmc|lowrank)\.(\w+)")
QUANTISED = re.compile(r"((?:.*\.)?weight(?:\.(?:atmc|lowrank)\.\w+)?)\.(codes|book|mask)")


@dataclass(frozen=True)
class Stored:
    """One weight in the form whose non-zeros are the budget; `merged` is the weight that the plain network has.

    kind: atmc (W = U V + C with an implicit identity), lowrank (W = U V) or plain (W itself). parts: finite float32 tensors;
    with a weight of shape [m, ...] and n = its size / m: U [m, r], for a convolution [m, r, 1, 1]; V [r, ...]; C [m, ...];
    for atmc r = min(m, n). quantised: the parts that are written as codes, of at most 256 distinct non-zeros each.
    Raises ValueError where the parts are not that. Gui et al. 2019 (ATMC).
    """

    kind: str
    parts: Mapping[str, Tensor]
    quantised: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in PARTS:
            raise ValueError(f"is of the kind {self.kind!r}; known: {', '.join(PARTS)}")
        missing = [part for part in PARTS[self.kind] if part not in self.parts]
        extra = [part for part in (*self.parts, *self.quantised) if part not in PARTS[self.kind]]
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"has an unknown part {extra[0]!r}"
            raise ValueError(f"{what}; {self.kind} needs {', '.join(PARTS[self.kind])}")
        for part, tensor in self.parts.items():
            if tensor.dtype != torch.float32 or not tensor.numel() or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"has a part {part} that is empty, not float32 or not finite")
        if self.kind != "plain":
            self._check_shapes()

    def _check_shapes(self) -> None:
        left, right = self.parts["U"].shape, self.parts["V"].shape
        if len(right) not in (2, 4) or len(left) != len(right) or tuple(left[2:]) != (1,) * (len(left) - 2):
            raise ValueError(
                f"has factors U {tuple(left)} and V {tuple(right)}; expected [m, r] and [r, n], or [m, r, 1, 1] and [r, c, h, w]"
            )
        if left[1] != right[0]:
            raise ValueError(f"has factors U {tuple(left)} and V {tuple(right)}: inner dimensions {left[1]}, {right[0]} differ")
        rank, most = left[1], min(self.shape[0], self.shape[1:].numel())
        if rank > most or (self.kind == "atmc" and rank != most):
            expected = f"exactly {most}" if self.kind == "atmc" else f"at most {most}"
            raise ValueError(f"has the inner dimension {rank}, {self.kind} needs {expected} for a weight {tuple(self.shape)}")
        if "C" in self.parts and self.parts["C"].shape != self.shape:
            raise ValueError(f"has C of shape {tuple(self.parts['C'].shape)}, U V has {tuple(self.shape)}")

    @property
    def shape(self) -> torch.Size:
        if self.kind == "plain":
            return self.parts["W"].shape
        return torch.Size([self.parts["U"].shape[0], *self.parts["V"].shape[1:]])

    @cached_property
    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight in float32, to the same bit on every machine.

        As matrices: atmc adds the identity to V if n <= m, else to U. U V is a sum of the products of a column of U and a row
        of V, started at 0 and added in their order, every product and every sum rounded to float32; atmc adds C last.
        Raises ValueError where that is not finite.
        """
        if self.kind == "plain":
            return self.parts["W"]
        left, right = self.parts["U"].flatten(1), self.parts["V"].flatten(1)
        if self.kind == "atmc" and right.shape[1] <= len(left):
            right = right + torch.eye(right.shape[1])
        elif self.kind == "atmc":
            left = left + torch.eye(len(left))
        total = torch.zeros(len(left), right.shape[1])
        for k in (left.any(0) & right.any(1)).nonzero().flatten().tolist():  # other products are 0 and change nothing
            total += left[:, k, None] * right[k]
        total = total.view(self.shape)
        total = total + self.parts["C"] if self.kind == "atmc" else total
        if not bool(torch.isfinite(total).all()):
            raise ValueError("has factors whose product is too large for float32")
        return total


class StoredWeight(nn.Module):
    """Gives a layer the merged weight of its stored form, whatever lies beneath: attached by a method as its last act."""

    merged: Tensor

    def __init__(self, form: Stored) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("merged", form.merged)

    def forward(self, weight: Tensor) -> Tensor:
        return self.merged


def form_of(layer: Any) -> Stored:
    """A layer's stored form: what its method stored, else the plain weight."""
    part = layer.parametrizations.weight[0] if parametrize.is_parametrized(layer, "weight") else None
    return part.form if isinstance(part, StoredWeight) else Stored("plain", {"W": layer.weight.detach().cpu()})


def stored_forms(model: nn.Module) -> dict[str, Stored]:
    """What a method stored in place of weights, by the names these have in the plain state dict."""
    parts = {f".{name}": module for name, module in model.named_modules() if isinstance(module, StoredWeight)}
    return {name.replace(".parametrizations.weight.0", ".weight")[1:]: part.form for name, part in parts.items()}


# ---- writing ---------------------------------------------------------------------------------------------------------


def stored_state(state: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The state dict with each weight in `stored` replaced by its stored form; reading it gives `state` again, bit by bit.

    Raises ValueError for a stored form that does not merge to the state's weight, or has too many values for its code book.
    """
    out = dict(state)
    for name, form in stored.items():
        if name not in state or not torch.equal(form.merged, state[name].detach().cpu()):
            raise ValueError(f"the stored form of {name} is not the network's weight of that name")
        del out[name]
        for part, tensor in form.parts.items():
            key = name if form.kind == "plain" else f"{name}.{form.kind}.{part}"
            out |= _coded(key, tensor) if part in form.quantised else {key: tensor}
    return out


def _coded(name: str, values: Tensor) -> dict[str, Tensor]:
    """Codes, their book, and, where 256 values leave no code for zero, a mask."""
    kept = values != 0
    book, places = torch.unique(values[kept], return_inverse=True)
    if len(book) > BOOK:
        raise ValueError(f"{name} holds {len(book):,} distinct non-zero values; a code book has at most {BOOK}")
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    full = len(book) == BOOK
    codes[kept] = (places if full else places + 1).to(torch.uint8)
    return {f"{name}.codes": codes, f"{name}.book": book, **({f"{name}.mask": kept.to(torch.uint8)} if full else {})}


# ---- reading ---------------------------------------------------------------------------------------------------------


def merge_stored(state: Mapping[str, Tensor], where: Path, largest: int) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """(the state with plain merged weights, the stored forms by the names of these weights).

    state: dense finite tensors, floating ones in float32. largest: bytes that the decoded and merged weights may take.
    Raises UserError, one sentence, for a missing factor, shapes that do not fit, codes outside the book and other damage.
    """
    decoded, coded = _decoded(state, where, largest)
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in decoded.items():
        factor = FACTOR.fullmatch(name)
        if factor is None and name not in coded:
            found[name] = tensor
            continue
        weight, kind, part = factor.groups() if factor else (name, "plain", "W")
        parts.setdefault(weight, {}).setdefault(kind, {})[part] = tensor
        found[weight] = tensor  # holds its place
    stored = {}
    for weight, kinds in parts.items():
        if len(kinds) > 1 or (weight in decoded and weight not in coded):
            raise UserError(f"{where} holds {weight} in more than one form; keep one of them")
        ((kind, tensors),) = kinds.items()
        codes = frozenset(part for part in tensors if (weight if kind == "plain" else f"{weight}.{kind}.{part}") in coded)
        stored[weight], found[weight] = _form(kind, tensors, codes, weight, where, largest)
        largest -= 4 * found[weight].numel()
    return found, stored


def _form(
    kind: str, tensors: dict[str, Tensor], codes: frozenset[str], weight: str, where: Path, largest: int
) -> tuple[Stored, Tensor]:
    try:
        form = Stored(kind, tensors, codes)
        if 4 * form.shape.numel() > largest:
            raise ValueError("unpacks to more than a checkpoint may")
        return form, form.merged
    except ValueError as reason:
        raise UserError(f"{where}: {weight} (stored form {kind}) {reason}") from reason


def _decoded(state: Mapping[str, Tensor], where: Path, largest: int) -> tuple[dict[str, Tensor], set[str]]:
    """(the state with values in place of codes, the names of the tensors that were codes)."""
    found: dict[str, Tensor] = {}
    coded: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = QUANTISED.fullmatch(name)
        if match is None:
            found[name] = tensor
        else:
            coded.setdefault(match[1], {})[match[2]] = tensor
            found.setdefault(match[1], tensor)
    for name, own in coded.items():
        if name in state:
            raise UserError(f"{where} holds {name} in more than one form; keep one of them")
        largest -= 4 * max(tensor.numel() for tensor in own.values())
        if largest < 0:
            raise UserError(f"{where} unpacks to more than a checkpoint may and is refused")
        try:
            found[name] = _values(own)
        except ValueError as reason:
            raise UserError(f"{where}: the quantised {name} {reason}") from reason
    return found, set(coded)


def _values(own: Mapping[str, Tensor]) -> Tensor:
    """Code i is book[i] where the mask is 1, else 0; without a mask code 0 is 0 and code i is book[i - 1]."""
    for part in ("codes", "book"):
        if part not in own:
            raise ValueError(f"has no {part}; it needs codes and a book")
    codes, book, mask = own["codes"], own["book"], own.get("mask")
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"has codes of type {codes.dtype}; codes are whole numbers, best uint8")
    if book.dim() != 1 or not book.is_floating_point() or len(book) > BOOK or bool((book == 0).any()):
        raise ValueError(f"has a book of shape {tuple(book.shape)}; it must list up to {BOOK} floating point values other than 0")
    if mask is not None and (mask.shape != codes.shape or not bool(((mask == 0) | (mask == 1)).all())):
        raise ValueError("has a mask that is not 0 or 1 for each code")
    table = book if mask is not None else torch.cat([book.new_zeros(1), book])
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if not 0 <= low <= high <= len(table) - 1 and codes.numel():
        raise ValueError(f"has a code outside its book: codes {low} to {high}, known 0 to {len(table) - 1}")
    values = table[codes.flatten().int()].view(codes.shape)
    return values if mask is None else torch.where(mask != 0, values, torch.zeros_like(values))
