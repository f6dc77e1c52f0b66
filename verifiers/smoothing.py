"""The verifier `smoothing`: a certificate about the smoothed classifier."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .binomial import certified_radius, lower_confidence_bound, radius_cap
from .proof import ABSTAIN, OPEN, PROVED, Proof
from .sequential import Boundary, curtailed_boundary, decide, look_schedule, sequential_boundary

__all__ = ["CHUNK", "Smoothing", "certified_radius", "image_digest", "lower_confidence_bound", "noise_seed", "radius_cap"]

CHUNK = 100  # noise draws with one generator seed; batches are whole chunks, so counts do not depend on the batch size
CURTAILED_LOOKS = 100  # about as often a curtailed run of the fixed rule asks whether it may stop


def image_digest(image: Tensor) -> str:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def noise_seed(seed: int, image: str, stream: str, chunk: int) -> int:
    """Every image and chunk has noise of its own; selection and estimation never share any."""
    text = f"{seed}/{image}/{stream}/{chunk}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Smoothing:
    """Randomized smoothing: with probability at least 1 - alpha per sample, the smoothed classifier is constant in the ball.

    Cohen et al. 2019 (arXiv 1902.02918): n0 noisy copies choose the class, fresh ones bound its probability; abstains where
    that does not exceed 1/2. `eps` is the l2 radius that the suite asks about; the radius returned is what was proven. The
    statement is about g(x) = argmax_c P(f(x + N(0, sigma^2)) = c), never about f: attacks on f do not contradict it. sigma
    and radii are in [0,1] pixel units; noisy images are not clipped.

    rule `fixed`: n draws and the Clopper-Pearson radius of their hits. With `curtail` draws stop as soon as those that remain
    cannot change the answer to "radius >= eps?"; the answer is that of all n draws, and the radius is eps or 0 only (such a
    run abstains where even the remaining draws could not win 1/2, and is open elsewhere).
    rule `sequential`: at most n draws answer "radius >= r?" for eps and every r of `grid`; the radius is the largest of them
    that was certified, one alpha covers all (see `sequential.py`). It looks after whole chunks of 100 draws, each look
    `growth` times the one before. `futility`, the chance of giving up where n draws would certify, costs certificates and adds
    none; `predicted` of an open row is a guess. It abstains where p > 1/2 fails the same test or cannot be decided.
    A draw with a logit that is NaN or infinite counts in n and for no class.
    `details`: hits and n per sample, for `sequential` also looks, int64 [N, looks, 2] of (n, hits), padded with -1.
    Raises ValueError for another norm and for settings that make no sense together.
    """

    norm: str = "l2"
    eps: Fraction = Fraction(1, 4)
    sigma: float = 0.25
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    seed: int = 0
    batch: int = 1000
    rule: Literal["fixed", "sequential"] = "fixed"
    curtail: bool = False
    grid: tuple[Fraction, ...] = ()
    growth: Fraction = Fraction(11, 10)
    futility: float = 0.01
    deterministic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.norm != "l2":
            raise ValueError(f"smoothing with Gaussian noise certifies l2 balls, not {self.norm!r}")
        if not (0 < self.sigma < math.inf and self.n0 >= 1 and self.n >= 1 and 0 < self.alpha < 0.5):
            raise ValueError(
                "smoothing needs sigma > 0, n0 >= 1, n >= 1 and 0 < alpha < 1/2, "
                f"got sigma={self.sigma}, n0={self.n0}, n={self.n}, alpha={self.alpha}"
            )
        object.__setattr__(self, "grid", tuple(Fraction(str(radius)) for radius in self.grid))  # a suite writes texts or floats
        self._rule()

    def _rule(self) -> None:
        """Refuses settings of one rule beside the other: a record must not name what was not used."""
        if self.rule not in ("fixed", "sequential"):
            raise ValueError(f"rule must be 'fixed' or 'sequential', got {self.rule!r}")
        if self.rule == "fixed" and self.grid:
            raise ValueError(f"grid={[str(radius) for radius in self.grid]} belongs to rule='sequential'; leave it out here")
        if self.rule == "sequential" and self.curtail:
            raise ValueError("curtail=True belongs to rule='fixed'; rule='sequential' stops early by itself")
        if (self.curtail or self.rule == "sequential") and not self.radii[0] > 0:
            raise ValueError(f"draws can stop early only at radii above 0, got {self.radii[0]}")
        if list(self.grid) != sorted(set(self.grid)):
            raise ValueError(f"grid must ascend, got {[str(radius) for radius in self.grid]}")
        if not (self.growth >= Fraction(101, 100) and 0 < self.futility < 1):
            raise ValueError(f"smoothing needs growth >= 1.01 and 0 < futility < 1, got {self.growth} and {self.futility}")

    @property
    def radii(self) -> tuple[Fraction, ...]:
        """The radii in question, ascending: eps and the grid."""
        return tuple(sorted({*self.grid, self.eps}))

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many draws the rule looks at the hits; the last is n."""
        if self.rule == "sequential":
            return look_schedule(self.n, CHUNK, self.growth)
        step = CHUNK * math.ceil(self.n / (CHUNK * CURTAILED_LOOKS))
        return (*range(step, self.n, step), self.n) if self.curtail else (self.n,)

    def boundaries(self) -> list[Boundary]:
        """The test of each radius in question; none for n draws whose radius is wanted."""
        if self.rule == "sequential":
            return [sequential_boundary(self.looks, float(r), self.sigma, self.alpha, self.futility) for r in self.radii]
        return [curtailed_boundary(self.looks, float(self.eps), self.sigma, self.alpha)] if self.curtail else []

    @torch.no_grad()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        boundaries, half = self.boundaries(), self._half()
        guesses, seen, radii, sure = [], [], [], []
        for image in x:
            votes = self._counts(model, image, (0, self.n0), "select")
            guess = int(votes.argmax())
            looks = self._estimate(model, image, guess, boundaries)
            guesses.append(guess)
            seen.append(looks)
            radii.append(self._radius(looks, boundaries))
            sure.append(bool(votes.any()) and (radii[-1] > 0 or not self._abstains(looks, half)))
        predicted = torch.where(torch.tensor(sure, dtype=torch.bool), torch.tensor(guesses, dtype=torch.int64), -1)
        radius = torch.where(predicted == y.cpu(), torch.tensor(radii, dtype=torch.float64), 0.0)
        return Proof(
            radius=radius,
            margin=torch.full_like(radius, math.nan),
            predicted=predicted,
            status=tuple(self._status(int(p), float(r)) for p, r in zip(predicted, radius)),
            details=self._details(seen),
        )

    def _estimate(self, model: nn.Module, image: Tensor, guess: int, boundaries: list[Boundary]) -> list[tuple[int, int]]:
        """(draws, hits of the class) at every look, up to the one that settles all questions."""
        seen: list[tuple[int, int]] = []
        drawn = hits = 0
        for look in self.looks:
            hits += int(self._counts(model, image, (drawn, look), "estimate")[guess])
            drawn = look
            seen.append((drawn, hits))
            if boundaries and decide(_hits(seen), boundaries)[1][0] >= 0:
                break
        return seen

    def _radius(self, seen: list[tuple[int, int]], boundaries: list[Boundary]) -> float:
        """The proven radius, 0 if none, derived from the looks alone."""
        if not boundaries:
            return float(certified_radius(np.array([seen[-1][1]]), self.n, self.sigma, self.alpha)[0])
        level = int(decide(_hits(seen), boundaries)[0][0])
        radii = self.radii if self.rule == "sequential" else (self.eps,)
        return float(radii[level - 1]) if level else 0.0

    def _half(self) -> Boundary:
        """The test of p > 1/2, by the rule in use."""
        smallest = math.ulp(0.0)  # a radius above 0: the smallest there is
        if self.rule == "sequential":
            return sequential_boundary(self.looks, smallest, self.sigma, self.alpha, self.futility)
        return curtailed_boundary(self.looks, smallest, self.sigma, self.alpha)

    def _abstains(self, seen: list[tuple[int, int]], half: Boundary) -> bool:
        """Whether the hits settle that the class did not win; before the last look they may leave it open."""
        level, last = decide(_hits(seen), [half])
        return bool(last[0] >= 0 and level[0] == 0)

    def _status(self, predicted: int, radius: float) -> str:
        """proved where the radius reaches eps, abstain where no class won, else open."""
        if predicted < 0:
            return ABSTAIN
        return PROVED if radius > 0 and radius >= float(self.eps) else OPEN

    def _details(self, seen: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        last = torch.tensor([looks[-1] for looks in seen], dtype=torch.int64).view(-1, 2)
        found = {"hits": last[:, 1], "n": last[:, 0]}
        if self.rule == "sequential":
            table = torch.full((len(seen), len(self.looks), 2), -1, dtype=torch.int64)
            for row, looks in enumerate(seen):
                table[row, : len(looks)] = torch.tensor(looks, dtype=torch.int64)
            found["looks"] = table
        return found

    def _counts(self, model: nn.Module, image: Tensor, draws: tuple[int, int], stream: str) -> Tensor:
        """How often each class is predicted under the noise of draws first..last-1: int64 [C] on the model's device."""
        counts: Tensor | None = None
        for noise in self._noise(image, draws, stream):
            logits = model(image + self.sigma * noise)
            classes = logits[torch.isfinite(logits).all(1)].argmax(1)
            now = torch.bincount(classes, minlength=logits.shape[1])
            counts = now if counts is None else counts + now
        assert counts is not None
        return counts

    def _noise(self, image: Tensor, draws: tuple[int, int], stream: str) -> Iterator[Tensor]:
        """The draws of whole chunks; the first must be a chunk's first, and the last chunk may be cut short."""
        digest, (begin, end) = image_digest(image), draws
        assert begin % CHUNK == 0
        chunks, group = math.ceil(end / CHUNK), max(1, self.batch // CHUNK)
        for first in range(begin // CHUNK, chunks, group):
            yield torch.cat([
                self._chunk(image, digest, stream, chunk, min(CHUNK, end - chunk * CHUNK))
                for chunk in range(first, min(first + group, chunks))
            ])

    def _chunk(self, image: Tensor, digest: str, stream: str, chunk: int, size: int) -> Tensor:
        generator = torch.Generator(image.device).manual_seed(noise_seed(self.seed, digest, stream, chunk))
        return torch.randn(size, *image.shape, generator=generator, device=image.device)


def _hits(seen: list[tuple[int, int]]) -> np.ndarray:
    return np.array([[hits for _, hits in seen]])
