"""The phase store: finished phases are loaded, the code between a method's yields is run again, the first unfinished trains.

A phase that nothing of a method's own takes part in is shared by every method that starts from the same weights: that is how
LWM and HYDRA, at all densities, use one pre-training.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import locked, make_folder, write_whole
from .loop import Epoch, Snapshots, run_phase
from .provenance import code_digest, identity
from .sparsity import effective_state, is_attached
from .train import Budget, Phase, PruningMethod, Training, derived_seed, nothing

SECONDS_BETWEEN_SNAPSHOTS = 2.0
CURVE = "curve"  # in a finished phase's metadata: [epoch, loss, gradient] of each epoch


@contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is seeded or drawn inside leaves the caller's generators untouched."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def fit(
    model: nn.Module,
    method: PruningMethod,
    density: Fraction,
    training: Training,
    store: Path | None = None,
    report: Callable[[str, int, int, float], None] = nothing,
    curve: Callable[[str, list[Epoch]], None] = nothing,
) -> dict[str, Tensor]:
    """Train and prune `model` in place; returns the plain state dict with zeros in it.

    What the method stored in place of weights (factors, codes) is left on the model: `factors.stored_forms(model)`.

    With a `store` folder, every finished phase and the state inside the current one survive a kill, and a second run gives
    bit-identical weights. curve(phase, its epochs) is called at the end of every phase, for stored ones too.
    """
    with own_randomness():
        phases, number = method(model, density, training), 0
        while True:
            torch.manual_seed(derived_seed(training.seed, "surgery", number))
            phase = next(phases, None)
            if phase is None:
                return effective_state(model)
            number += 1
            if store is None:
                curve(phase.name, run_phase(model, phase, training, report=report))
            else:
                key = phase_key(model, phase, method, density, training)
                curve(phase.name, _run_stored(model, phase, training, make_folder(store), key, report))


def _run_stored(
    model: nn.Module, phase: Phase, training: Training, store: Path, key: str, report: Callable[[str, int, int, float], None]
) -> list[Epoch]:
    finished, partial = store / f"{key}.safetensors", store / f"{key}.partial.pt"
    if (epochs := _loaded(model, finished)) is not None:
        return epochs
    with locked(store / f"{key}.lock"):  # a worker that needs the same phase waits for it instead of repeating it
        if (epochs := _loaded(model, finished)) is not None:
            return epochs
        epochs = run_phase(model, phase, training, FileSnapshots(partial), report)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        facts = {CURVE: json.dumps([astuple(one) for one in epochs])}
        write_whole(finished, lambda temporary: save_file(state, temporary, facts))
        partial.unlink(missing_ok=True)
    return epochs


def _loaded(model: nn.Module, finished: Path) -> list[Epoch] | None:
    """The curve of a phase whose result is now loaded into the model; None where there is none, or a damaged file."""
    if not finished.exists():
        return None
    try:
        with safe_open(finished, framework="pt") as file:
            epochs = [Epoch(*one) for one in json.loads(file.metadata()[CURVE])]
        model.load_state_dict(load_file(finished, device=str(next(model.parameters()).device)))
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError, TypeError):
        return None
    return epochs


class FileSnapshots(Snapshots):
    """Keeps the state inside a phase in one file, at most every few seconds."""

    def __init__(self, path: Path, seconds: float | None = None) -> None:
        self.path = path
        self.seconds = SECONDS_BETWEEN_SNAPSHOTS if seconds is None else seconds
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - self.saved >= self.seconds:
            write_whole(self.path, lambda temporary: torch.save(state(), temporary))
            self.saved = time.monotonic()


def _budget_that_matters(budget: Budget, hooked: bool) -> Budget:
    """A plain phase depends on its own epochs, learning rate and ramp alone; what a hook may read is anyone's guess."""
    if hooked:
        return budget
    return replace(
        budget, pretrain=0, prune=0, finetune=0, lr=0.0, prune_lr=0.0, finetune_lr=0.0, ramp=0.0, wait=0.0, init="torch"
    )


def phase_key(model: nn.Module, phase: Phase, method: PruningMethod, density: Fraction, training: Training) -> str:
    """What a phase's result depends on. Method and density count only where they can: attached parts, hooks, a penalty."""
    total = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    own = (identity(method), str(density)) if is_attached(model) or not phase.is_plain else None
    device = next(model.parameters()).device
    facts = (
        str(model),
        (phase.name, phase.epochs, phase.lr, phase.ramp, phase.wait, sorted(phase.trains(model))),
        identity(training.of(phase).objective),
        training.of(phase).data.digest,
        training.augment,
        _budget_that_matters(training.budget, hooked=not phase.is_plain),
        training.seed,
        own,
        code_digest(),
        (device.type, torch.get_num_threads(), torch.__version__),
    )
    total.update(repr(facts).encode())
    return total.hexdigest()
