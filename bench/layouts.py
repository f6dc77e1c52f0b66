"""Foreign layouts: what others save becomes plain weights with zeros in place under plain names, or one sentence.

Everything here is pure: tensors in, tensors out, and words that say what was recognised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .factors import TITLES, Stored, merge_stored
from .sparsity import kept_of, top_k

LARGEST = 4 * 2**30  # bytes of a checkpoint, packed or unpacked
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
# Where training scripts keep the weights, in the order of preference; averages of weights only where there is nothing else.
NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "state",
         "ema", "ema_state_dict", "model_ema", "params_ema")  # fmt: skip
PREFIXES = ("module.", "model.", "_orig_mod.")
DEEPEST = 4
LONGEST = 500  # characters of a tensor's name
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
PART = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.(original|\d+\.\w+)")
NUMBERED = re.compile(r"\d{1,6}\.\w+")
COUNTER = "num_batches_tracked"


@dataclass
class Layout:
    """A state dict on its way to plain weights, and what was recognised while it went."""

    state: dict[str, Tensor]
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)


def plain(found: Any, where: Path, density: Fraction | None = None) -> Layout:
    """Plain float32 weights with zeros in place, from whatever a checkpoint file held.

    Understands dicts nested under the usual keys, prefixes of wrappers, sparse tensors, half and double precision, pairs of
    torch.nn.utils.prune, masks and scores as parametrizations, and HYDRA's `popup_scores` (Sehwag et al. 2020), for which
    `density` says what share of each layer is kept; and the stored forms of `bench.factors`. Raises UserError for all else.
    """
    mapping, words, notes = _unnested(found, where)
    layout = Layout(tensors(mapping, where), words, notes)
    if any(value.layout != torch.strided for value in mapping.values()):
        layout.words.append("sparse tensors")
    _strip(layout)
    _merge_pairs(layout, where)
    chosen = _merge_parts(layout, where, density) + _merge_scores(layout, where, density)
    if density is not None and not chosen:
        raise UserError(f"{where} holds no scores that a density could choose from; leave --density out (--claim tests sparsity)")
    _single(layout)
    _merge_forms(layout, where)
    if all(NUMBERED.fullmatch(name) for name in layout.state):
        layout.words.append("names of a bare nn.Sequential")
    return layout


# ---- one flat mapping of plain tensors -------------------------------------------------------------------------------


def _unnested(found: Any, where: Path) -> tuple[Mapping[Any, Any], list[str], list[str]]:
    words: list[str] = []
    notes: list[str] = []
    for _ in range(DEEPEST):
        if not isinstance(found, Mapping) or not any(isinstance(value, Mapping) for value in found.values()):
            break
        nests = [key for key in NESTS if _may_hold(found.get(key))]
        if not nests:
            break
        words.append(f"nested under {nests[0]!r}")
        if nests[1:]:
            notes.append(f"the file also holds {', '.join(map(repr, nests[1:]))}; the weights of {nests[0]!r} are used")
        found = found[nests[0]]
    if not isinstance(found, Mapping):
        raise UserError(f"{where} holds a {type(found).__name__}, not a state dict (names to tensors); save model.state_dict()")
    return found, words, notes


def _may_hold(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor | Mapping) for one in value.values())


def tensors(found: Mapping[Any, Any], where: Path) -> dict[str, Tensor]:
    """The mapping as names to dense finite CPU tensors of `LARGEST` bytes in all; raises UserError where it is not that."""
    out: dict[str, Tensor] = {}
    room = LARGEST
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{where} is not a plain state dict (names to tensors): it holds {type(value).__name__} under "
                f"{str(name)[:80]!r}; save model.state_dict()"
            )
        if not name.isprintable() or len(name) > LONGEST:
            raise UserError(f"{where} holds a tensor called {name[:80]!r}, which is no name of a layer; save model.state_dict()")
        if type(value) not in (Tensor, nn.Parameter) or value.is_nested or value.is_quantized or value.is_meta:
            raise UserError(f"{where}: the tensor {name!r} is of a special kind ({type(value).__name__}); save plain ones")
        if value.dtype not in DTYPES:
            raise UserError(f"{where}: the tensor {name!r} has type {value.dtype}; plain checkpoints hold floats and integers")
        room -= _bytes(value)  # before anything touches it: a view may claim any size
        if room < 0:
            raise UserError(f"{where} unpacks to more than {LARGEST:,} bytes and is refused")
        out[name] = _dense(name, value.detach(), where)
    if not out:
        raise UserError(f"{where} holds no tensors")
    return out


def _inner(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(outer indices, inner indices, values) of a compressed sparse tensor."""
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return value.ccol_indices(), value.row_indices(), value.values()
    return value.crow_indices(), value.col_indices(), value.values()


def _bytes(value: Tensor) -> int:
    parts: tuple[Tensor, ...] = ()
    if value.layout == torch.sparse_coo:
        parts = value._indices(), value._values()
    elif value.layout in COMPRESSED:
        parts = _inner(value)
    return math.prod(value.shape) * value.element_size() + sum(part.numel() * part.element_size() for part in parts)


def _dense(name: str, value: Tensor, where: Path) -> Tensor:
    try:
        if value.layout == torch.sparse_coo:
            value = torch.sparse_coo_tensor(value._indices(), value._values(), value.shape, check_invariants=True).to_dense()
        elif value.layout in COMPRESSED:
            value = torch.sparse_compressed_tensor(
                *_inner(value), value.shape, layout=value.layout, check_invariants=True
            ).to_dense()
        value = value.resolve_neg().contiguous()
        finite = bool(torch.isfinite(value.float()).all())
    except (RuntimeError, ValueError, TypeError, IndexError) as reason:
        raise UserError(f"{where}: the tensor {name!r} is damaged: {next(iter(str(reason).splitlines()), '')}") from reason
    if not finite:
        raise UserError(f"{where}: the tensor {name!r} holds NaN or infinite values (as float32)")
    return value


def _prefix(names: Iterable[str]) -> str:
    """What wrappers (DataParallel, Lightning, torch.compile, averages) put before every one of the names."""
    found, names = "", list(names)
    for _ in range(DEEPEST):
        own = next((one for one in PREFIXES if names and all(name.startswith(found + one) for name in names)), None)
        if own is None:
            break
        found += own
    return found


def _strip(layout: Layout) -> None:
    averaged = {name: value for name, value in layout.state.items() if name != "n_averaged"}  # AveragedModel's own counter
    prefix = _prefix(averaged)
    if prefix:
        layout.state = {name.removeprefix(prefix): value for name, value in averaged.items()}
        layout.words.append(f"prefix {prefix!r}")


# ---- masks and scores ------------------------------------------------------------------------------------------------


def _masked(weight: Tensor, mask: Tensor, name: str, where: Path) -> Tensor:
    if mask.shape != weight.shape:
        raise UserError(f"{where}: the mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError(f"{where}: the mask of {name} holds other values than 0 and 1")
    return torch.where(mask != 0, weight, torch.zeros_like(weight))


def _by_scores(weight: Tensor, scores: Tensor, name: str, where: Path, density: Fraction | None) -> Tensor:
    if density is None:
        raise UserError(
            f"{where} is a checkpoint of scores ({name} and more) and does not hold its density; give the kept share of each "
            "layer, for example --density 0.1"
        )
    if not 0 < density <= 1:
        raise UserError(f"--density must be above 0 and at most 1, got {density}")
    if scores.shape != weight.shape or not scores.numel():
        raise UserError(f"{where}: {name} has shape {tuple(scores.shape)}, its weight {tuple(weight.shape)}")
    if not scores.is_floating_point():
        raise UserError(f"{where}: {name} has type {scores.dtype}; scores are floating point numbers")
    return torch.where(top_k(scores.abs(), kept_of(scores.numel(), density)) != 0, weight, torch.zeros_like(weight))


def _merge_pairs(layout: Layout, where: Path) -> None:
    """torch.nn.utils.prune: NAME_orig * NAME_mask becomes NAME."""
    state: dict[str, Tensor] = {}
    pairs = {name.removesuffix("_orig") for name in layout.state if name.endswith("_orig")}
    for name, value in layout.state.items():
        base = name.removesuffix("_orig").removesuffix("_mask")
        if base not in pairs:
            state[name] = value
        elif name.endswith("_orig"):
            mask = layout.state.get(f"{base}_mask")
            if mask is None:
                raise UserError(
                    f"{where} holds {name} without {base}_mask; only torch.nn.utils.prune is understood, so remove any other "
                    "reparametrisation (such as spectral_norm) before saving"
                )
            state[base] = _masked(value, mask, base, where)
        elif name == base:
            raise UserError(f"{where} holds both {base} and {base}_orig; save model.state_dict()")
    if pairs:
        layout.words.append("torch.nn.utils.prune masks")
    layout.state = state


def _merge_parts(layout: Layout, where: Path, density: Fraction | None) -> int:
    """NAME's parametrizations by masks and scores become NAME; returns how many were by scores."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in layout.state.items():
        found = PART.fullmatch(name)
        if found is None:
            state[name] = value
            continue
        base = found[1] + found[2]
        parts.setdefault(base, {})[found[3]] = value
        state[base] = value  # holds its place
    by_scores = 0
    for base, own in parts.items():
        steps = sorted(own.keys() - {"original"}, key=lambda part: int(part.split(".")[0]))
        kinds = [part.split(".")[1] for part in steps]
        in_order = [int(part.split(".")[0]) for part in steps] == list(range(len(steps)))
        if base in layout.state or "original" not in own or not steps or not in_order or not {*kinds} <= {"mask", "scores"}:
            raise UserError(
                f"{where}: {base} has the parametrization {', '.join(sorted(own)[:4])}, which is not an original with masks or "
                "scores; bake it in (torch.nn.utils.parametrize.remove_parametrizations) before saving"
            )
        weight = own["original"]
        for step, kind in zip(steps, kinds, strict=True):
            name = f"{base} ({step})"
            if kind == "mask":
                weight = _masked(weight, own[step], name, where)
            else:
                weight, by_scores = _by_scores(weight, own[step], name, where, density), by_scores + 1
        state[base] = weight
    if parts:
        layout.words.append("masks as parametrizations" + (f", scores at density {density}" if by_scores else ""))
    layout.state = state
    return by_scores


def _merge_scores(layout: Layout, where: Path, density: Fraction | None) -> int:
    """HYDRA: per layer, the weights with the largest |popup_scores| are kept; returns how many layers had scores."""
    state, scored = dict(layout.state), [name for name in layout.state if name.split(".")[-1] == "popup_scores"]
    for name in scored:
        base = name.removesuffix("popup_scores") + "weight"
        if base not in layout.state:
            raise UserError(f"{where} holds {name} without {base}; save model.state_dict()")
        state[base] = _by_scores(layout.state[base], state.pop(name), name, where, density)
    if scored:
        layout.words.append(f"HYDRA scores at density {density}")
    layout.state = state
    return len(scored)


def _single(layout: Layout) -> None:
    """Floating point tensors as float32, and a note where that changed a value."""
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in layout.state.values()
                    if value.is_floating_point() and value.dtype != torch.float32})  # fmt: skip
    if not kinds:
        return
    layout.words.append(" and ".join(kinds))
    changed = 0
    for name, value in layout.state.items():
        if value.is_floating_point():
            layout.state[name] = value.float()
            changed += int((layout.state[name].to(torch.float64) != value.to(torch.float64)).sum())
    if changed:
        layout.notes.append(f"{changed:,} numbers were rounded to float32; what is certified is the rounded network")


def _merge_forms(layout: Layout, where: Path) -> None:
    """Factors and codes become the weights they stand for."""
    layout.state, layout.stored = merge_stored(layout.state, where, LARGEST)
    forms = layout.stored.values()
    for kind in sorted({form.kind for form in forms}):
        layout.words.append(f"{TITLES[kind]} of {sum(form.kind == kind for form in forms)} weights")
    if any(form.quantised and form.kind != "plain" for form in forms):
        layout.words.append("quantised factors")


# ---- names -----------------------------------------------------------------------------------------------------------


def arranged(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the state under the names of `wanted`, notes) where that is certain; otherwise the state as it is.

    Certain is: the names of a bare nn.Sequential ("0.weight", "2.weight") in the order of their numbers have exactly the
    tensors and shapes of `wanted` in its order. BatchNorm's step counter, which old files lack, plays no part in eval mode.
    """
    found, notes = dict(state), []
    prefix = _prefix(wanted)  # a network of the user's own may have a part that is called like a wrapper
    if prefix and not _prefix(found):
        found = {prefix + name: value for name, value in found.items()}
    if not found.keys() & wanted.keys() and all(NUMBERED.fullmatch(name) for name in found):
        names = _by_position(found, wanted)
        if names:
            found = {new: found[old] for old, new in names.items()}
            notes.append("layers of a bare nn.Sequential were matched by their order and shapes")
    counters = [name for name in wanted if name not in found and name.split(".")[-1] == COUNTER]
    if counters and wanted.keys() - found.keys() == set(counters):
        found |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
        notes.append(f"the step counters of BatchNorm ({COUNTER}) are missing, which changes nothing in eval mode")
    return found, notes


def _by_position(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """{old name: new name}, or nothing if the layers differ in number, tensors or shapes."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in wanted))
    numbers = sorted({int(name.split(".")[0]) for name in state})
    if len(layers) != len(numbers):
        return {}
    place = dict(zip(numbers, layers, strict=True))
    names = {old: f"{place[int(old.split('.')[0])]}.{old.split('.')[1]}" for old in state}
    if len(set(names.values())) < len(names) or set(names.values()) != set(wanted):
        return {}
    return names if all(state[old].shape == wanted[new].shape for old, new in names.items()) else {}
