"""Plain checkpoints: read without ever unpickling an object, refused in one sentence when they are not what they say."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .files import write_whole
from .models import MODELS, Shape, build_model

LARGEST = 4 * 2**30  # bytes of a checkpoint, packed or unpacked
KEY = "sparsecert"
LARGEST_SIDE, MOST_CLASSES = 4096, 100_000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


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


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Card | None]:
    """(state dict, card or None) of a .safetensors file or of a .pt / .pth state dict. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; checkpoints above {LARGEST:,} are refused")
    state, card = _safetensors(path) if _is_safetensors(path) else (_torch_state(path), None)
    if not state:
        raise UserError(f"{path} holds no tensors")
    for name, value in state.items():
        if value.dtype not in DTYPES:
            raise UserError(f"{path}: the tensor {name!r} has type {value.dtype}; plain checkpoints hold floats and integers")
        if not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{path}: the tensor {name!r} holds NaN or infinite values (as float32)")
    return state, card


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
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from reason
    if KEY not in metadata:
        return state, None
    try:
        words = json.loads(metadata[KEY])
        card = Card(**{**words, "shape": tuple(words["shape"]), "mean": tuple(words["mean"]), "std": tuple(words["std"])})
    except (ValueError, TypeError, KeyError) as reason:
        raise UserError(f"{path}: its header does not describe a sparsecert checkpoint: {reason}") from reason
    return state, card


def _torch_state(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise UserError(f"{path} unpacks to more than {LARGEST:,} bytes and is refused")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as reason:
        raise UserError(
            f"{path} holds pickled objects or is damaged, and nothing is ever unpickled here; save model.state_dict() instead"
        ) from reason
    except Exception as reason:
        first = next(iter(str(reason).splitlines()), type(reason).__name__)
        raise UserError(f"{path} is not a checkpoint that can be read: {first}") from reason
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in loaded.items()):
        raise UserError(f"{path} is not a plain state dict (names to tensors); save model.state_dict()")
    return loaded


def network(state: Mapping[str, Tensor], card: Card, where: Path) -> nn.Module:
    """The card's network with exactly these weights, in eval mode. Raises UserError for another architecture's weights."""
    with torch.device("meta"):  # names and shapes only: a card may claim any size
        wanted = build_model(card.arch, card.shape, card.classes).state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if missing or extra or wrong:
        raise UserError(f"{where} is not a checkpoint of {_named(card)}: {_difference(wanted, state, missing, extra, wrong)}")
    model = build_model(card.arch, card.shape, card.classes, card.mean, card.std)
    model.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()})
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
    """The one architecture whose names and shapes are exactly these, if there is one."""
    have = {name: tuple(value.shape) for name, value in state.items()}
    for arch in MODELS:
        try:
            with torch.device("meta"):
                model = build_model(arch, shape, classes)
        except UserError:
            continue
        if {name: tuple(value.shape) for name, value in model.state_dict().items()} == have:
            return arch
    return None
