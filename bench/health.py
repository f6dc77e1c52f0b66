"""Health flags: what makes robustness numbers mean less than they seem; each has a section in docs/health_flags.md."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from verifiers import UnsupportedNetworkError
from verifiers.compaction import compact

from .errors import UserError

PAGE = "docs/health_flags.md"
MOST = 256  # images that are looked at (all of them for the range of the pixels)
BATCH = 64
TOLERANCE = 1e-5  # share of the largest logit below which two runs, or two images, count as equal
MODES = (_DropoutNd, _NormBase, nn.RReLU)


@dataclass(frozen=True)
class Flag:
    """One finding: its name, a sentence with the figures, and where it is explained."""

    name: str
    sentence: str
    page: str


def flags(model: nn.Module, x: Tensor, y: Tensor) -> list[Flag]:
    """Every reason found to distrust attacks or certificates of this network; the network itself is left as it is.

    model: images to logits [N, C], judged in the mode it is in; x: float [N, C, H, W], as it will be attacked; y: int64 [N].
    At most 256 images, evenly spread, are run. Raises UserError where the network's answer is not [N, C] or a label is none
    of its classes. After the checks of RobustBench and "On Evaluating Adversarial Robustness" (Carlini et al. 2019).
    """
    if not len(x):
        raise UserError("there are no images to check the network with")
    found = [*_pixels(x), *_modes(model)]
    at = torch.linspace(0, len(x) - 1, min(MOST, len(x)), device=x.device).round().long()
    x, y = x[at], y[at]
    if any(layer.training for layer in model.modules()):
        model = copy.deepcopy(model)  # a layer in train mode would learn from being looked at
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        logits, again = _logits(model, x), _logits(model, x)
        if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
            raise UserError(f"the labels {int(y.min())} to {int(y.max())} are not all of the network's {logits.shape[1]} classes")
        if not bool(torch.isfinite(logits).all()):
            count = int((~torch.isfinite(logits)).any(1).sum())
            return [*found, _flag("non-finite outputs", f"the logits of {count} of {len(x)} images are NaN or infinite")]
        return [*found, *_random(logits, again), *_softmax(logits), *_constant(model, x, logits), *_gradients(model, x, y)]


def collapsed(model: nn.Module, x: Tensor) -> list[str]:
    """Warnings for a record: that all of (at most 256) images x [N, C, H, W] get the same logits, and whether all others must."""
    x = x[:MOST]
    return [flag.sentence for flag in _constant(model, x, _logits(model, x))]


def _flag(name: str, sentence: str) -> Flag:
    return Flag(name, sentence, f"{PAGE}#{name.replace(' ', '-')}")


def _pixels(x: Tensor) -> list[Flag]:
    low, high = float(x.min()), float(x.max())
    if 0 <= low <= high <= 1:
        return []
    sentence = f"pixels lie in [{low:g}, {high:g}], while eps, sigma and radii are in [0,1] units"
    return [_flag("inputs outside the unit interval", sentence)]


def _modes(model: nn.Module) -> list[Flag]:
    """Layers in train mode that act differently there: torch's own, and any of the user's that is in train mode."""
    names = [
        name or type(layer).__name__ for name, layer in model.named_modules()
        if layer.training and (isinstance(layer, MODES) or not type(layer).__module__.startswith(("torch.nn", "verifiers")))
    ]  # fmt: skip
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [_flag("train-mode layers", f"{', '.join(names[:3])}{more} would act as in training; call model.eval()")]


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    out = torch.cat([_checked(model(part), len(part)) for part in x.split(BATCH)])
    return out.double()


def _checked(logits: Tensor, count: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the network must answer {count} images with {count} rows of at least 2 logits, it answers with {got}")
    return logits


def _scale(logits: Tensor) -> float:
    return max(float(logits.abs().max()), 1e-30)


def _random(logits: Tensor, again: Tensor) -> list[Flag]:
    moved = float((logits - again).abs().max())
    if moved <= TOLERANCE * _scale(logits):
        return []
    changed = int((logits.argmax(1) != again.argmax(1)).sum())
    sentence = f"two runs on the same images differ by up to {moved:.3g} in the logits and in {changed} of {len(logits)} classes"
    return [_flag("random outputs", sentence)]


def _softmax(logits: Tensor) -> list[Flag]:
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        sentence = f"all {len(logits)} answers are non-negative and sum to 1; attacks and margins need logits"
        return [_flag("softmax outputs", sentence)]
    return []


def _constant(model: nn.Module, x: Tensor, logits: Tensor) -> list[Flag]:
    spread = float((logits - logits[:1]).abs().max())
    if len(logits) < 2 or spread > TOLERANCE * _scale(logits):
        return []
    sentence = f"{len(logits)} images get the same logits, of class {int(logits[0].argmax())}: the network has collapsed"
    return [_flag("constant network", sentence + _cut_off(model, x))]


def _cut_off(model: nn.Module, x: Tensor) -> str:
    """Whether the weights alone say that no image gets other logits."""
    try:
        constant = compact(model, x[:1]).constant
    except UnsupportedNetworkError:
        return ""
    return "; no path of non-zero weights leads from a pixel to a logit" if constant else ""


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Flag]:
    silent = sum(_silent(model, part, label) for part, label in zip(x.split(BATCH), y.split(BATCH), strict=True))
    if not silent:
        return []
    share = 100 * silent / len(x)
    sentence = f"the loss has no gradient at {silent} of {len(x)} images ({share:.1f} %), where PGD stands still"
    return [_flag("zero input gradients", sentence)]


def _silent(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many images have a zero gradient of the cross-entropy at every pixel."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        loss = F.cross_entropy(model(x), y, reduction="sum")
        if not loss.requires_grad:
            return len(x)
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    return len(x) if gradient is None else int((gradient == 0).flatten(1).all(1).sum())
