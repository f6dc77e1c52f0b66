"""Plain checkpoints: read without ever unpickling an object, refused in one sentence when they are not what they say."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .factors import Stored
from .files import write_whole
from .layouts import LARGEST, arranged, plain, tensors
from .models import ARCHITECTURES, Shape, build_model

KEY = "sparsecert"
LARGEST_SIDE, MOST_CLASSES = 4096, 100_000


@dataclass(frozen=True)
class Card:
    """What a checkpoint of ours says about itself."""

    arch: str
    shape: Shape
    classes: int
    data: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sides = len(self.shape) == 3 and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in self.shape)
        if not sides or type(self.classes) is not int or not 2 <= self.classes <= MOST_CLASSES:
            raise ValueError(f"shape {self.shape!r} and {self.classes!r} classes describe no image classifier")
        if not isinstance(self.arch, str) or not isinstance(self.data, str):
            raise ValueError(f"arch {self.arch!r} and data {self.data!r} must be names")
        if not all(isinstance(value, int | float) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean {self.mean!r} and std {self.std!r} must be numbers")


def save_checkpoint(path: Path, state: Mapping[str, Tensor], card: Card) -> None:
    """Plain weights with zeros in place as safetensors, and the card in the file's own header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {KEY: json.dumps(asdict(card), sort_keys=True)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as plain float32 weights: what the file says of itself, which layout it has, what else is worth saying."""

    state: dict[str, Tensor]
    card: Card | None
    layout: str
    notes: tuple[str, ...] = ()
    stored: Mapping[str, Stored] = field(default_factory=dict)


def read(path: Path, density: Fraction | None = None) -> Loaded:
    """Any pruned checkpoint as plain weights with zeros in place, without ever unpickling an object.

    Understands what `bench.layouts.plain` does, in .safetensors and in torch's files, zipped or legacy. density: the share
    of each layer that a file of scores keeps. Raises UserError, one sentence, for anything else.
    """
    found, card, container = _content(path)
    layout = plain(found, path, density)
    return Loaded(layout.state, card, ", ".join([container, *layout.words]), tuple(layout.notes), layout.stored)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Card | None]:
    """(state dict, card or None) of a .safetensors file or of a .pt / .pth state dict, as they stand. Raises UserError."""
    found, card, _ = _content(path)
    if not isinstance(found, Mapping):
        raise UserError(f"{path} is not a plain state dict (names to tensors); save model.state_dict()")
    return tensors(found, path), card


def _content(path: Path) -> tuple[Any, Card | None, str]:
    """(whatever the file holds, card or None, the kind of file)."""
    if not path.is_file():
        raise UserError(f"{path} is a folder; name the checkpoint in it" if path.is_dir() else f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; checkpoints above {LARGEST:,} are refused")
    if path.suffix.lower() == ".onnx":
        raise UserError(f"{path} is an ONNX file, which is not read here; save the weights with torch.save(model.state_dict())")
    if _is_safetensors(path):
        state, card = _safetensors(path)
        return state, card, "safetensors"
    return _torch_content(path), None, "torch file" if zipfile.is_zipfile(path) else "legacy torch file"


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as handle:
        return handle.read(9)[8:] == b"{"


def _safetensors(path: Path) -> tuple[dict[str, Tensor], Card | None]:
    try:
        with safe_open(path, framework="pt") as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as reason:
        raise UserError(f"{path} is not a whole safetensors file: it was cut off or damaged; save or copy it again") from reason
    if KEY not in metadata:
        return state, None
    try:
        words = json.loads(metadata[KEY])
        card = Card(**{**words, "shape": tuple(words["shape"]), "mean": tuple(words["mean"]), "std": tuple(words["std"])})
    except (ValueError, TypeError, KeyError, RecursionError) as reason:
        raise UserError(f"{path}: its header does not describe a sparsecert checkpoint: {reason}") from reason
    return state, card


def _torch_content(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                    raise UserError(f"{path} unpacks to more than {LARGEST:,} bytes and is refused")
                if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
                    raise UserError(f"{path} is a TorchScript program, which is never run here; save model.state_dict() instead")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own plans
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as reason:
        raise UserError(
            f"{path} holds pickled objects or is damaged, and nothing is ever unpickled here; save model.state_dict() instead"
        ) from reason
    except Exception as reason:
        raise UserError(f"{path} is no torch or safetensors file, or it was cut off; save or copy it again") from reason


def network(state: Mapping[str, Tensor], card: Card, where: Path) -> nn.Module:
    """The card's network with exactly these weights, in eval mode. Raises UserError for another architecture's weights."""
    with torch.device("meta"):  # names and shapes only: a card may claim any size
        wanted = build_model(card.arch, card.shape, card.classes).state_dict()
    state = matched(state, wanted, _named(card), where)
    return _filled(build_model(card.arch, card.shape, card.classes, card.mean, card.std), state)


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str, where: Path) -> nn.Module:
    """The given network with exactly these weights, in eval mode; `what` names it. Raises UserError for any other's weights."""
    return _filled(model, matched(state, model.state_dict(), what, where))


def matched(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, where: Path) -> dict[str, Tensor]:
    """The state under the names of `wanted`, with its types; raises UserError unless names and shapes are exactly those."""
    state, _ = arranged(state, wanted)
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if missing or extra or wrong:
        raise UserError(f"{where} is not a checkpoint of {what}: {_difference(wanted, state, missing, extra, wrong)}")
    return {name: state[name].to(value.dtype) for name, value in wanted.items()}


def _filled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model.load_state_dict(dict(state))
    return model.eval().requires_grad_(False)


def _named(card: Card) -> str:
    return f"{card.arch} for {'x'.join(map(str, card.shape))} images and {card.classes} classes"


def _difference(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], missing: list[str], extra: list[str], wrong: list[str]
) -> str:
    if missing:
        return f"it lacks {', '.join(missing[:3])}" + (" and more" if len(missing) > 3 else "")
    if extra:
        return f"it also holds {', '.join(extra[:3])}" + (" and more" if len(extra) > 3 else "")
    name = wrong[0]
    return f"{name} has shape {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"


def guess_arch(state: Mapping[str, Tensor], shape: Shape, classes: int) -> str | None:
    """The one architecture, at full width, whose names and shapes are exactly these, if there is one."""
    for arch in ARCHITECTURES:
        try:
            with torch.device("meta"):
                model = build_model(arch, shape, classes)
        except UserError:
            continue
        wanted = model.state_dict()
        have, _ = arranged(state, wanted)
        if have and {name: value.shape for name, value in wanted.items()} == {name: value.shape for name, value in have.items()}:
            return arch
    return None


def classes_of(arch: str, state: Mapping[str, Tensor], shape: Shape) -> int | None:
    """How many logits the last layer of the named architecture has in this state; None if it is not there."""
    with torch.device("meta"):
        last = list(build_model(arch, shape, 2).state_dict())[-1]
    numbered = [name for name in state if re.fullmatch(r"\d{1,6}\.bias", name)]  # a bare nn.Sequential
    name = last if last in state else max(numbered, key=lambda name: int(name.split(".")[0]), default="")
    return len(state[name]) if name in state and state[name].dim() else None
