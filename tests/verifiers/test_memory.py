"""Batches fit an estimate of the memory, shrink where it lacks, and a network that cannot fit is refused in a sentence."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.verifiers.small_nets import RULE_NETS, images, labels, randomised
from verifiers import AlphaCrown, Crown, CrownIBP, UnsupportedNetworkError, lirpa_compat, memory
from verifiers.lowering import lower
from verifiers.memory import NoBoundError, in_batches, relaxation_bytes

EPS = Fraction(1, 50)
LACKS = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("reason", LACKS, ids=lambda reason: type(reason).__name__)
def test_lack_of_memory_halves_the_batch_and_keeps_the_answers(reason: Exception) -> None:
    sizes: list[int] = []

    def bound(at: Tensor) -> Tensor:
        sizes.append(len(at))
        if len(at) > 3:
            raise reason
        return at * 10

    assert in_batches(bound, 7, 16).tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert sizes == [7, 7, 4, 2, 2, 2, 1]


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    def bound(at: Tensor) -> Tensor:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        in_batches(bound, 4, 4)


def test_one_image_that_does_not_fit_is_refused() -> None:
    def bound(at: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(NoBoundError, match="one image takes more memory"):
        in_batches(bound, 4, 4)


class Narrow(lirpa_compat.BoundedModule):  # type: ignore[misc]
    """A library that runs out of memory above two images."""

    asked: list[int] = []  # noqa: RUF012

    def compute_bounds(self, x: Any = None, *more: Any, **options: Any) -> Any:
        self.asked.append(len(x[0]))
        if len(x[0]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123456 bytes.")
        return super().compute_bounds(x, *more, **options)


@pytest.mark.parametrize("verifier", [CrownIBP(eps=EPS), Crown(eps=EPS), AlphaCrown(eps=EPS, iterations=2)])
def test_a_verifier_goes_on_in_smaller_batches(monkeypatch: pytest.MonkeyPatch, verifier: Any) -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(5)
    y = labels(net, x)
    whole = verifier(net, x, y)
    monkeypatch.setattr(lirpa_compat, "BoundedModule", Narrow)
    Narrow.asked.clear()
    proof = verifier(net, x, y)
    torch.testing.assert_close(proof.margin, whole.margin, atol=1e-4, rtol=1e-4)
    assert proof.status == whole.status
    assert max(Narrow.asked) > 2
    assert proof.notes == whole.notes


def test_batches_are_as_large_as_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(6)
    y = labels(net, x)
    lowered = lower(net, x)
    needed = relaxation_bytes(lowered.network, x, "CROWN", lowered.patches_are_sound, 5)
    whole = Crown(eps=EPS)(net, x, y)
    sizes: list[int] = []

    class Counting(lirpa_compat.BoundedModule):  # type: ignore[misc]
        def compute_bounds(self, x: Any = None, **options: Any) -> Any:
            if options["method"] == "CROWN" and x[0].ptb.x_L is not None:
                sizes.append(len(x[0]))
            return super().compute_bounds(x=x, **options)

    monkeypatch.setattr(lirpa_compat, "BoundedModule", Counting)
    monkeypatch.setattr(memory, "LIMIT", int(2.5 * needed))
    torch.testing.assert_close(Crown(eps=EPS)(net, x, y).margin, whole.margin, atol=1e-5, rtol=1e-5)
    assert max(sizes) == 2


def test_a_network_above_the_limit_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = randomised(RULE_NETS["MaxPool2d"]()), images(2)
    monkeypatch.setattr(memory, "LIMIT", 1000)
    with pytest.raises(UnsupportedNetworkError, match=r"CROWN of this network would take about .* GiB per image, more than"):
        Crown(eps=EPS)(net, x, labels(net, x))


def test_alpha_crown_above_the_limit_is_answered_by_crown_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = (nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU())
    net, x = randomised(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(20, 4))), images(2)
    y, lowered = labels(net, x), lower(net, x)
    some, more = (relaxation_bytes(lowered.network, x, method, False, 4) for method in ("CROWN", "alpha-CROWN"))
    assert some < more
    monkeypatch.setattr(memory, "LIMIT", int((some + more) / 2))
    proof = AlphaCrown(eps=EPS)(net, x, y)
    assert "alpha-CROWN of this network would take" in proof.notes[-1]
    torch.testing.assert_close(proof.margin, Crown(eps=EPS)(net, x, y).margin)


def test_the_estimate_by_hand() -> None:
    """72 pixels, 20 ReLUs, 4 classes: CROWN bounds 20 neurons by 72 pixels, CROWN-IBP 3 margins by 72; six float32 copies."""
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4)).eval(), images(1)
    network = lower(net, x).network
    assert relaxation_bytes(network, x, "CROWN-IBP", False, 4) == 3 * 72 * 4 * 6
    assert relaxation_bytes(network, x, "CROWN", False, 4) == 20 * 72 * 4 * 6


def test_patches_take_less_than_matrices_and_no_more_than_their_windows() -> None:
    """By hand: the 2 * 36 outputs of the second 3x3 convolution depend on 5x5 windows of the 2 channels of the image."""
    first, second = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    x = images(1)
    network = lower(net.eval(), x).network
    assert relaxation_bytes(network, x, "CROWN", True, 2) == 72 * 50 * 4 * 6
    assert relaxation_bytes(network, x, "CROWN", False, 2) == 72 * 72 * 4 * 6
