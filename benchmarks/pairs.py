"""Every objective trains every architecture: two steps, a finite loss, a gradient in every tensor, its own ball respected.

    python -m benchmarks.pairs [--write] [ARCHITECTURE ...]

Networks have 1/16 of their width; images are 16x16 in colour. --write keeps what was tried in
docs/objectives_and_architectures.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.data import Split
from bench.loop import TrainingDivergedError, run_phase
from bench.models import ARCHITECTURES, build_model
from bench.objectives import OBJECTIVES, bounded, mixtrain
from bench.train import Budget, Phase, Step, Training
from verifiers.ball import Interval

PAGE = Path(__file__).resolve().parent.parent / "docs" / "objectives_and_architectures.md"
SHAPE, CLASSES, IMAGES, BATCH = (3, 16, 16), 10, 16, 8
EPS = Fraction(1, 1000)
BOUNDS = ((bounded, "ibp_margins"), (bounded, "crown_ibp_margins"), (mixtrain, "symbolic_margins"))
BOUNDED = ("ibp", "crown-ibp", "sabr", "mtl-ibp", "mixtrain")
OVERFLOW = "left out: so many layers widen interval bounds beyond float32 at the initial weights"
UNBOUNDED = ("noise", "stability", "wrm")  # they move images without a ball


@dataclass
class Seen:
    """What was watched while one pair trained."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    without_gradient: set[str] = field(default_factory=set)
    farthest: float = 0.0  # an image that the network saw, from the nearest clean one, linf
    bounds: int = 0
    excess: float = float("-inf")  # of a lower bound over a margin that a point of its box has, relative to 1 + |margin|


def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *SHAPE), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(IMAGES) % CLASSES, torch.arange(IMAGES), 255.0)


def objective_of(name: str) -> Any:
    """The objective with a small ball and few steps."""
    kind = OBJECTIVES[name]
    fields = kind.__dataclass_fields__
    chosen: dict[str, Any] = {"eps": EPS, "steps": 2, "replays": 2, "k": 2}
    chosen |= {"share": 1.0} if name == "mixtrain" else {}  # no coin: every batch is bounded
    return kind(**{key: value for key, value in chosen.items() if key in fields})


def reason_against(objective: str, arch: str) -> str | None:
    """Why a pair is left out; None where it is not."""
    allowed = getattr(OBJECTIVES[objective], "networks", ("*",))
    if any(fnmatch(arch, pattern) for pattern in allowed):
        return None
    return f"{objective} takes memory of pixels times width: only {', '.join(allowed)}"


@contextmanager
def watched(seen: Seen, clean: Tensor) -> Iterator[Callable[[nn.Module, tuple[Any, ...]], None]]:
    """Every bound that an objective computes is held against points of its box; gives the watch for the network's inputs."""

    def holding(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def margins(model: nn.Module, box: Interval, y: Tensor, *rest: Any) -> Tensor:
            lower = real(model, box, y, *rest)
            seen.farthest = max(seen.farthest, distance(box.lower, clean), distance(box.upper, clean))
            with torch.no_grad():
                for share in (0.0, 0.5, 1.0):
                    logits = model(box.lower + share * (box.upper - box.lower))
                    reached = logits.gather(1, y[:, None]) - logits
                    seen.excess = max(seen.excess, float(((lower - reached) / (1 + reached.abs())).max()))
            seen.bounds += 1
            return lower

        return margins

    def inputs(_: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], Tensor):
            seen.farthest = max(seen.farthest, distance(args[0].detach(), clean))

    with ExitStack() as stack:
        for module, name in BOUNDS:
            stack.enter_context(mock.patch.object(module, name, holding(getattr(module, name))))
        yield inputs


def distance(points: Tensor, clean: Tensor) -> float:
    """The largest linf distance of a point from the nearest clean image."""
    gaps = (points.unsqueeze(1) - clean.unsqueeze(0)).abs().flatten(2).amax(2)
    return float(gaps.amin(1).max())


class Watching(nn.Module):
    """The network; tells its inputs to a function (a hook would be refused by the bounds' tracer)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.tell: list[Callable[[nn.Module, tuple[Any, ...]], None]] = []

    def forward(self, x: Tensor) -> Tensor:
        for tell in self.tell:
            tell(self, (x,))
        out: Tensor = self.network(x)
        return out


def train(objective: str, arch: str) -> Seen:
    """Two steps of one pair; raises what the training raises."""
    data, seen = split(), Seen()
    model = Watching(build_model(f"{arch}@1/16", SHAPE, CLASSES))
    seen.without_gradient = {name for name, _ in model.named_parameters()}

    def after_backward(step: Step) -> None:
        seen.steps += 1
        reached = {name for name, one in step.model.named_parameters() if one.grad is not None and bool((one.grad != 0).any())}
        seen.without_gradient -= reached

    def report(_: str, epoch: int, epochs: int, loss: float) -> None:
        seen.losses.append(loss)

    budget = Budget(lr=0.01, batch=BATCH, ramp=0.0, weight_decay=0.0)
    tool = objective_of(objective)
    epochs = getattr(tool, "replays", 1)  # replays take the place of epochs
    with watched(seen, data.pixels()) as inputs:
        model.tell.append(inputs)
        run_phase(model, Phase("train", epochs, 0.01, after_backward=after_backward), Training(tool, data, budget), None, report)
    return seen


def judged(objective: str, arch: str) -> str:
    """ok, the reason why the pair is left out, or what is wrong."""
    reason = reason_against(objective, arch)
    if reason is not None:
        return f"left out: {reason}"
    try:
        seen = train(objective, arch)
    except TrainingDivergedError:
        return OVERFLOW if objective in BOUNDED else "the loss is not finite"
    if seen.steps < 2:
        return f"only {seen.steps} steps"
    if objective in BOUNDED and not seen.bounds:
        return "no bound was computed"
    if not all(loss == loss and abs(loss) < float("inf") for loss in seen.losses):
        return f"the loss is {seen.losses}"
    if seen.without_gradient:
        return f"no gradient in {', '.join(sorted(seen.without_gradient)[:3])}"
    if objective not in UNBOUNDED and seen.farthest > float(EPS) + 1e-6:
        return f"an image left its ball: {seen.farthest:.6f}"
    if seen.excess > 1e-4:
        return f"a bound lies {seen.excess:.6f} of its size above a margin"
    return "ok"


def written() -> dict[tuple[str, str], str]:
    """The table of the page: what stands there of each (objective, architecture)."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    reasons = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    names = rows[0][1:] if rows else []
    return {(name, row[0]): reasons.get(cell, cell) for row in rows[1:] for name, cell in zip(names, row[1:], strict=True)}


def page(found: dict[tuple[str, str], str]) -> str:
    archs = [arch for arch in ARCHITECTURES if any(arch == one for _, one in found)]
    reasons = sorted({text for text in found.values() if text != "ok"})
    marks = {text: str(number) for number, text in enumerate(reasons, 1)}
    lines = [
        "# Every objective with every architecture", "",
        "Made by `python -m benchmarks.pairs --write`. At 1/16 of the width on 16x16 images, eps 1/1000, in at least two",
        "optimizer steps: the loss is finite, a gradient reaches every trainable tensor, every image that the network sees lies",
        "in the objective's ball (`noise`, `stability` and `wrm` have none), and every bound that is trained on lies below",
        "the margins at three points of its box. `tests/bench/test_pairs.py` holds all pairs to that.", "",
        "| | " + " | ".join(f"`{name}`" for name in OBJECTIVES) + " |",
        "|---|" + "---|" * len(OBJECTIVES),
    ]
    for arch in archs:
        cells = [marks.get(found[name, arch], "ok") for name in OBJECTIVES]
        lines.append(f"| `{arch}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {text}" for text, number in marks.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    archs = [name for name in sys.argv[1:] if name != "--write"] or list(ARCHITECTURES)
    found = written()
    for arch in archs:
        found |= {(name, arch): judged(name, arch) for name in OBJECTIVES}
        print(arch, *(f"{name}: {found[name, arch]}" for name in OBJECTIVES), sep="\n    ", flush=True)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
