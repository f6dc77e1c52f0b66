"""The verifier `smoothing`: a certificate about the smoothed classifier."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from .proof import ABSTAIN, OPEN, PROVED, Proof

CHUNK = 100  # noise draws with one generator seed; batches are whole chunks, so counts do not depend on the batch size


def lower_confidence_bound(hits: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """One-sided Clopper-Pearson: P(bound > p) <= alpha for hits ~ Binomial(n, p). float64, same shape as hits."""
    hits = np.asarray(hits, dtype=np.float64)
    inner = special.betaincinv(np.maximum(hits, 1), n - np.minimum(hits, n - 1) + 1, alpha)
    return np.where(hits <= 0, 0.0, np.where(hits >= n, alpha ** (1 / n), inner))


def radius_cap(sigma: float, n: int, alpha: float) -> float:
    """The largest radius that n draws can certify: sigma * Phi^-1(alpha^(1/n))."""
    return max(0.0, sigma * float(special.ndtri(alpha ** (1 / n))))


def certified_radius(hits: np.ndarray, n: int, sigma: float, alpha: float) -> np.ndarray:
    """l2 radius sigma * Phi^-1(p_A) where p_A > 1/2, else 0, never above the cap. Cohen et al. 2019, theorem 1."""
    bound = lower_confidence_bound(hits, n, alpha)
    radius = np.where(bound > 0.5, sigma * special.ndtri(np.maximum(bound, 0.5)), 0.0)
    return np.minimum(radius, radius_cap(sigma, n, alpha))


def image_digest(image: Tensor) -> str:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def noise_seed(seed: int, image: str, stream: str, chunk: int) -> int:
    """Every image and chunk has noise of its own; selection and estimation never share any."""
    text = f"{seed}/{image}/{stream}/{chunk}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Smoothing:
    """Randomized smoothing: with probability at least 1 - alpha per sample, the smoothed classifier is constant in the ball.

    Cohen et al. 2019 (arXiv 1902.02918): n0 noisy copies choose the class, n fresh ones bound its probability
    (Clopper-Pearson); abstains where the bound is at most 1/2. `eps` is the l2 radius that the suite asks about; the radius
    returned is what was proven. The statement is about g(x) = argmax_c P(f(x + N(0, sigma^2)) = c), never about f: attacks
    on f do not contradict it. sigma and radii are in [0,1] pixel units; noisy images are not clipped.
    """

    norm: str = "l2"
    eps: Fraction = Fraction(1, 4)
    sigma: float = 0.25
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    seed: int = 0
    batch: int = 1000
    deterministic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.norm != "l2":
            raise ValueError(f"smoothing with Gaussian noise certifies l2 balls, not {self.norm!r}")
        if not (0 < self.sigma < math.inf and self.n0 >= 1 and self.n >= 1 and 0 < self.alpha < 0.5):
            raise ValueError(
                "smoothing needs sigma > 0, n0 >= 1, n >= 1 and 0 < alpha < 1/2, "
                f"got sigma={self.sigma}, n0={self.n0}, n={self.n}, alpha={self.alpha}"
            )

    @torch.no_grad()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        guesses, hits = [], []
        for image in x:
            guess = int(self._counts(model, image, self.n0, "select").argmax())
            guesses.append(guess)
            hits.append(int(self._counts(model, image, self.n, "estimate")[guess]))
        counts, chosen = np.array(hits, dtype=np.int64), torch.tensor(guesses, dtype=torch.int64)
        radius = torch.from_numpy(certified_radius(counts, self.n, self.sigma, self.alpha)).view(-1)
        sure = torch.from_numpy(lower_confidence_bound(counts, self.n, self.alpha) > 0.5).view(-1)
        predicted = torch.where(sure, chosen, -1)
        radius = torch.where(predicted == y.cpu(), radius, 0.0)
        return Proof(
            radius=radius,
            margin=torch.full_like(radius, math.nan),
            predicted=predicted,
            status=tuple(self._status(int(p), float(r)) for p, r in zip(predicted, radius)),
            details={"hits": torch.from_numpy(counts), "n": torch.full_like(chosen, self.n)},
        )

    def _status(self, predicted: int, radius: float) -> str:
        """proved where the radius reaches eps, abstain where no class won, else open."""
        if predicted < 0:
            return ABSTAIN
        return PROVED if radius > 0 and radius >= float(self.eps) else OPEN

    def _counts(self, model: nn.Module, image: Tensor, draws: int, stream: str) -> Tensor:
        """How often each class is predicted under noise: int64 [C] on the model's device."""
        counts: Tensor | None = None
        for noise in self._noise(image, draws, stream):
            logits = model(image + self.sigma * noise)
            now = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
            counts = now if counts is None else counts + now
        assert counts is not None
        return counts

    def _noise(self, image: Tensor, draws: int, stream: str) -> Iterator[Tensor]:
        digest, chunks = image_digest(image), math.ceil(draws / CHUNK)
        group = max(1, self.batch // CHUNK)
        for first in range(0, chunks, group):
            yield torch.cat([
                self._chunk(image, digest, stream, chunk, min(CHUNK, draws - chunk * CHUNK))
                for chunk in range(first, min(first + group, chunks))
            ])

    def _chunk(self, image: Tensor, digest: str, stream: str, chunk: int, size: int) -> Tensor:
        generator = torch.Generator(image.device).manual_seed(noise_seed(self.seed, digest, stream, chunk))
        return torch.randn(size, *image.shape, generator=generator, device=image.device)
