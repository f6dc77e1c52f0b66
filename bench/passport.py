"""The sparsity passport: what a pruned network's weights really are, counted, and whether a claimed sparsity holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verifiers import UnsupportedNetworkError
from verifiers.compaction import compact

from .errors import UserError
from .factors import BOOK, Stored
from .reach import Reached, reach
from .sparsity import layer_counts, prunable, weights

Images = tuple[int, int, int]

NO_SHAPE = "the shape of the images is not known"
FLOAT = 32  # bits of a plain weight
PATTERNS = ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (1, 16), (2, 16), (4, 16), (8, 16))
BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 16), (1, 8), (1, 4), (16, 1), (8, 1), (4, 1))


def passport(model: nn.Module, shape: Images | None = None, stored: Mapping[str, Stored] | None = None) -> dict[str, Any]:
    """Exact counts of a plain network's conv and linear weights, as JSON-able numbers; biases and BatchNorm never count.

    Keys: kept, total, density (also of `conv` and `linear`), bits (methods.md 6.3, see `size`), reachable (needs the images'
    `shape`, [C, H, W]; {"not_computed": reason} where the network's graph has an operation without a rule), compacted (the same
    counts of the network without its dead and constant units, these as [kept, all], and whether no logit depends on the image;
    or not_computed), patterns (those of N:M that every layer they could apply to has), layers (the same per layer, distinct
    values and dead units), uncounted
    (sizes of matrices that are no weight of a Conv2d or Linear layer and appear in none of these numbers). Where the checkpoint
    held factors or codes, `stored` (see `stored_form`) counts these; all else is about the merged weights.
    """
    found = weights(model)
    if not found:
        raise UserError("the network has no convolution or linear layer whose weights could be counted")
    reached = _reached(model, shape)
    counts = layer_counts(model)
    kinds = {name: "conv" if isinstance(layer, nn.Conv2d) else "linear" for name, layer in prunable(model).items()}
    layers = {name: _layer(name, weight, kinds[name], reached) for name, weight in found.items()}
    parts = {kind: _share(counts[name] for name in counts if kinds[name] == kind) for kind in ("conv", "linear")}
    return {
        **_share(counts.values()), **parts, "bits": size(model), "reachable": _reachable(reached, found),
        "compacted": _compacted(model, shape),
        "patterns": _everywhere(found, {name: layer["patterns"] for name, layer in layers.items()}), "layers": layers,
        "uncounted": _uncounted(model), **({"stored": stored_form(model, stored)} if stored else {}),
    }  # fmt: skip


def claim_holds(model: nn.Module, claim: Fraction) -> tuple[bool, str]:
    """Whether at least the share `claim` of all conv and linear weights is exactly zero, and a sentence with the counts.

    Allowed are (1 - claim) N kept weights plus one per layer (whole numbers per layer round up), in exact arithmetic; tiny
    non-zero weights are kept weights. Raises UserError for a claim outside [0, 1].
    """
    if not 0 <= claim <= 1:
        raise UserError(f"--claim is the pruned share of the weights, from 0 to 1, got {claim}")
    counts = layer_counts(model)
    kept, total = sum(kept for kept, _ in counts.values()), sum(total for _, total in counts.values())
    allowed = (1 - claim) * total + len(counts)
    holds = kept <= allowed
    return holds, (
        f"the claimed pruned share {claim} {'holds' if holds else 'does not hold'}: {kept:,} of {total:,} conv and linear "
        f"weights are not zero, allowed are {int(allowed):,} ((1 - claim) of them and one for each of {len(counts)} layers)"
    )


def _share(counts: Iterable[tuple[int, int]]) -> dict[str, Any]:
    pairs = list(counts)
    kept, total = sum(kept for kept, _ in pairs), sum(total for _, total in pairs)
    return {"kept": kept, "total": total, "density": kept / total if total else None}


def _uncounted(model: nn.Module) -> dict[str, int]:
    counted = {id(layer.weight) for layer in prunable(model).values()}
    return {name: value.numel() for name, value in model.named_parameters() if value.dim() > 1 and id(value) not in counted}


def _layer(name: str, weight: Tensor, kind: str, reached: Reached | str) -> dict[str, Any]:
    fed = (weight != 0).flatten(1).any(1)
    out = {
        "kind": kind, "shape": list(weight.shape), **_share([(int((weight != 0).sum()), weight.numel())]),
        "distinct_values": distinct(weight), "units": len(weight), "units_without_incoming": int((~fed).sum()),
        "inputs_without_outgoing": int((~(weight != 0).transpose(0, 1).flatten(1).any(1)).sum()),
        "patterns": patterns(weight), "blocks": blocks(weight),
    }  # fmt: skip
    if isinstance(reached, Reached):
        heard = reached.heard[name]
        out |= {"units_without_way_out": int((~heard).sum()), "units_dead": int((~(heard & fed)).sum())}
        out |= {"reachable": int(reached.live[name].sum())}
    return out


# ---- reachability ----------------------------------------------------------------------------------------------------


def _reached(model: nn.Module, shape: Images | None) -> Reached | str:
    if shape is None:
        return NO_SHAPE
    try:
        return reach(model, shape)
    except UnsupportedNetworkError as reason:
        return str(reason)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as reason:  # a graph its rules do not fit
        return f"the network's graph could not be followed: {next(iter(str(reason).splitlines()), type(reason).__name__)}"


def _compacted(model: nn.Module, shape: Images | None) -> dict[str, Any]:
    if shape is None:
        return {"not_computed": NO_SHAPE}
    first = next(iter(prunable(model).values())).weight
    try:
        small = compact(model, torch.zeros(1, *shape, dtype=first.dtype, device=first.device))
    except UnsupportedNetworkError as reason:
        return {"not_computed": str(reason)}
    return {
        **_share(layer_counts(small.network).values()), "constant": small.constant,
        "units": [sum(side) for side in zip(*small.units.values(), strict=True)],
        "layers": {name: list(counts) for name, counts in small.units.items()},
    }  # fmt: skip


def _reachable(reached: Reached | str, found: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(reached, str):
        return {"not_computed": reached}
    return _share((int(live.sum()), found[name].numel()) for name, live in reached.live.items())


# ---- bits ------------------------------------------------------------------------------------------------------------


def distinct(weight: Tensor) -> int:
    """How many distinct non-zero values a tensor holds."""
    return int(torch.unique(weight[weight != 0]).numel())


def payload(nnz: int, values: int) -> int:
    """Bits of `nnz` non-zeros with `values` distinct values (Gui et al. 2019, ATMC): indices into a code book, or plain.

    With b = ceil(log2 values): nnz b + 32 values if 2^b < nnz, else 32 nnz. A tensor of more than 256 values whose code
    book would not pay off is a plain one, too: it was not quantised.
    """
    bits = (values - 1).bit_length() if values else 0
    booked = nnz * bits + FLOAT * values
    return booked if 2**bits < nnz and (values <= BOOK or booked < FLOAT * nnz) else FLOAT * nnz


def index_bits(weight: Tensor) -> int:
    """Bits that say where the non-zeros are: ceil(log2 g) each, g the largest step from one to the next in reading order."""
    places = (weight.flatten() != 0).nonzero().flatten()
    if not len(places):
        return 0
    gaps = torch.diff(places, prepend=places.new_tensor([-1]))
    return len(places) * (int(gaps.max()) - 1).bit_length()


def size(model: nn.Module) -> dict[str, Any]:
    """Bits and compression ratios (over 32 bits for each weight of the dense network), without and with positions.

    paper: non-zeros and code books alone, as ATMC counts; csr: the same and the bits of `index_bits`. plain: 32 bits for
    every non-zero. Biases and BatchNorm are free of charge.
    """
    found = list(weights(model).values())
    return _bits(found, sum(weight.numel() for weight in found))


def _bits(found: Iterable[Tensor], total: int) -> dict[str, Any]:
    """`size` of any tensors, over the `total` weights of a dense network."""
    found, dense = list(found), FLOAT * total
    kept = [int((weight != 0).sum()) for weight in found]
    values = sum(payload(nnz, distinct(weight)) for nnz, weight in zip(kept, found, strict=True))
    bits = {"plain": FLOAT * sum(kept), "paper": values, "csr": values + sum(index_bits(weight) for weight in found)}
    return {"dense": dense, **bits, "ratio": {name: bits[name] / dense for name in ("paper", "csr")}}


# ---- the stored form -------------------------------------------------------------------------------------------------


def stored_form(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Counts of the tensors that a checkpoint really holds (factors, quantised values), over the dense network's size.

    Keys: kept, total, density (may exceed 1), bits (as `size`: each factor is a tensor of its own; the implicit identity, biases
    and positions in `paper` are free), layers (kind, and per part its shape, kept, distinct values, whether it is quantised).
    A layer without a stored form counts with its plain weight. Each layer's own stored form is the one that merges to its weight.
    """
    found, left = weights(model), list(stored.values())
    forms = {name: _own_form(weight.cpu(), left) for name, weight in found.items()}
    tensors = [tensor for form in forms.values() for tensor in form.parts.values()]
    kept, total = sum(int((tensor != 0).sum()) for tensor in tensors), sum(weight.numel() for weight in found.values())
    layers = {
        name: {"kind": form.kind, "parts": {part: _part(form, part) for part in form.parts}} for name, form in forms.items()
    }
    return {"kept": kept, "total": total, "density": kept / total, "bits": _bits(tensors, total), "layers": layers}


def _own_form(weight: Tensor, left: list[Stored]) -> Stored:
    for place, form in enumerate(left):
        if form.shape == weight.shape and torch.equal(form.merged, weight):
            return left.pop(place)
    return Stored("plain", {"W": weight})


def _part(form: Stored, part: str) -> dict[str, Any]:
    tensor = form.parts[part]
    return {
        "shape": list(tensor.shape), "kept": int((tensor != 0).sum()), "distinct_values": distinct(tensor),
        "quantised": part in form.quantised,
    }  # fmt: skip


# ---- structure -------------------------------------------------------------------------------------------------------


def _grouped(weight: Tensor, of: int) -> Tensor | None:
    """[groups, of] non-zero flags: runs of `of` input channels (features), as sparse tensor cores read them."""
    if weight.shape[1] % of:
        return None
    return (weight != 0).movedim(1, -1).reshape(-1, of)


def patterns(weight: Tensor) -> list[str]:
    """The N:M patterns that hold exactly along the inputs: at most N non-zeros in every run of M. None for an empty tensor."""
    if not bool((weight != 0).any()):
        return []
    return [f"{n}:{m}" for n, m in PATTERNS if (runs := _grouped(weight, m)) is not None and int(runs.sum(1).max()) <= n]


def _everywhere(found: dict[str, Tensor], own: dict[str, list[str]]) -> list[str]:
    out = []
    for n, m in PATTERNS:
        able = [name for name, weight in found.items() if weight.shape[1] % m == 0 and bool((weight != 0).any())]
        if able and all(f"{n}:{m}" in own[name] for name in able):
            out.append(f"{n}:{m}")
    return out


def _whole(flags: Tensor) -> bool:
    """Whether every row of [blocks, weights] is all kept or all zero, and both kinds occur."""
    any_, all_ = flags.any(1), flags.all(1)
    return bool((any_ == all_).all()) and bool(any_.any()) and not bool(all_.all())


def blocks(weight: Tensor) -> list[str]:
    """The block patterns that hold exactly: every block is zero or wholly kept, and there are blocks of both kinds.

    output / input: all weights of an output unit / of an input; kernel: a convolution's window; RxC: of the weight as a
    matrix, outputs by the rest.
    """
    kept = weight != 0
    if bool(kept.all()) or not bool(kept.any()):
        return []
    wholes: dict[str, Callable[[Tensor], Tensor]] = {
        "output": lambda flags: flags.flatten(1),
        "input": lambda flags: flags.transpose(0, 1).flatten(1),
    }
    if weight.dim() == 4 and weight.shape[2] * weight.shape[3] > 1:
        wholes["kernel"] = lambda flags: flags.flatten(2).flatten(0, 1)
    found = [name for name, cut in wholes.items() if _whole(cut(kept))]
    matrix = kept.flatten(1)
    for rows, columns in BLOCKS:
        if matrix.shape[0] % rows == 0 and matrix.shape[1] % columns == 0:
            tiles = F.unfold(matrix[None, None].float(), (rows, columns), stride=(rows, columns))[0].T
            if _whole(tiles > 0):
                found.append(f"{rows}x{columns}")
    return found
