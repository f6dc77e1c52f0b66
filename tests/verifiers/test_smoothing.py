"""Randomized smoothing: numbers of the paper, counts that depend on nothing but the image, and how often it may be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from tests.verifiers.small_nets import Forward, images, labels, linear, randomised
from verifiers import VERIFIERS, Proof, Smoothing
from verifiers.sequential import decide
from verifiers.smoothing import CHUNK, certified_radius, lower_confidence_bound, noise_seed, radius_cap


def radius(hits: int, n: int, sigma: float = 0.25, alpha: float = 0.001) -> float:
    return float(certified_radius(np.array([hits]), n, sigma, alpha)[0])


def bound(hits: int, n: int, alpha: float = 0.001) -> float:
    return float(lower_confidence_bound(np.array([hits]), n, alpha)[0])


def test_check_values_of_the_method_card() -> None:
    assert bound(9_900, 10_000) == pytest.approx(0.98653, abs=5e-6)
    assert radius(9_900, 10_000) == pytest.approx(0.5531, abs=5e-5)
    assert bound(10_000, 10_000) == pytest.approx(0.99931, abs=5e-6)
    assert radius(10_000, 10_000) == pytest.approx(0.79964, abs=5e-6)
    assert radius(99_900, 100_000) == pytest.approx(0.75005, abs=5e-6)


@pytest.mark.parametrize("threshold, hits", [(110 / 255, 9_640), (0.4347, 9_651), (0.5, 9_818)])
def test_the_fewest_hits_that_reach_a_radius(threshold: float, hits: int) -> None:
    assert radius(hits - 1, 10_000) < threshold <= radius(hits, 10_000)


@pytest.mark.parametrize("n, alpha", [(1, 0.05), (100, 0.001), (10_000, 0.001), (100_000, 0.05)])
def test_the_bound_is_clopper_pearson_of_two_libraries(n: int, alpha: float) -> None:
    """A two-sided interval at 2 alpha is the one-sided bound at alpha."""
    hits = np.unique(np.linspace(0, n, 40).astype(int))
    theirs, _ = proportion_confint(hits, n, alpha=2 * alpha, method="beta")
    np.testing.assert_allclose(lower_confidence_bound(hits, n, alpha), theirs, rtol=1e-9, atol=1e-15)
    inner = hits[hits > 0]
    np.testing.assert_allclose(lower_confidence_bound(inner, n, alpha), stats.beta.ppf(alpha, inner, n - inner + 1), rtol=1e-9)


def test_the_bound_at_no_hits_and_at_all_hits() -> None:
    assert bound(0, 1000) == 0
    assert bound(1000, 1000) == pytest.approx(0.001**0.001, rel=1e-12)
    assert radius(0, 1000) == 0
    assert radius(1000, 1000) == pytest.approx(radius_cap(0.25, 1000, 0.001), rel=1e-12)


@pytest.mark.parametrize("n, alpha", [(5, 0.001), (100, 0.001), (1000, 0.05)])
def test_radii_grow_with_the_hits_up_to_the_cap_and_are_zero_at_a_half(n: int, alpha: float) -> None:
    hits = np.arange(n + 1)
    radii, bounds = certified_radius(hits, n, 0.5, alpha), lower_confidence_bound(hits, n, alpha)
    assert (np.diff(radii) >= 0).all()
    assert radii.max() <= radius_cap(0.5, n, alpha)
    assert (radii[bounds <= 0.5] == 0).all()
    assert (radii[bounds > 0.5] > 0).all()
    assert (bounds <= hits / n).all()
    np.testing.assert_allclose(2 * radii, certified_radius(hits, n, 1.0, alpha), rtol=1e-12)


def test_too_few_draws_certify_nothing() -> None:
    """alpha^(1/n) must exceed 1/2: nine draws at 0.001 cannot, ten can."""
    assert radius_cap(1.0, 9, 0.001) == 0
    assert radius(9, 9) == 0
    assert radius(10, 10) > 0


# -- it is wrong no more often than alpha ------------------------------------------------------------------------------

TRIALS, LEVEL = 20_000, 1e-6


def too_often(misses: int, alpha: float) -> bool:
    """Whether so many misses in TRIALS would be seen less than once in a million times at a rate of alpha."""
    return stats.binomtest(misses, TRIALS, alpha, alternative="greater").pvalue < LEVEL


def misses(p: float, n: int, alpha: float, rule: Callable[[np.ndarray], np.ndarray]) -> int:
    """How often the rule's bound exceeds the true p, over TRIALS binomial draws."""
    hits = np.random.default_rng(0).binomial(n, p, TRIALS)
    return int((rule(hits) > p).sum())


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("p, n", [(0.5, 1000), (0.9, 1000), (0.99, 10_000), (0.3, 100), (0.9995, 1000)])
def test_the_bound_misses_the_true_probability_no_more_often_than_alpha(p: float, n: int, alpha: float) -> None:
    assert not too_often(misses(p, n, alpha, lambda hits: lower_confidence_bound(hits, n, alpha)), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_wrong_bounds_are_found_out_by_the_same_test(alpha: float) -> None:
    n, p = 1000, 0.9
    assert too_often(misses(p, n, alpha, lambda hits: lower_confidence_bound(hits, n, 5 * alpha)), alpha)
    assert too_often(misses(p, n, alpha, lambda hits: hits / n), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_draws_that_chose_the_class_cannot_bound_its_probability(alpha: float) -> None:
    """Twenty equal classes: the one with the most hits has them by luck, which fresh draws do not share."""
    n, p, rng = 1000, 0.05, np.random.default_rng(4)
    reused = rng.multinomial(n, [p] * 20, TRIALS).max(1)
    assert too_often(int((lower_confidence_bound(reused, n, alpha) > p).sum()), alpha)
    fresh = rng.binomial(n, p, TRIALS)
    assert not too_often(int((lower_confidence_bound(fresh, n, alpha) > p).sum()), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("r, n", [(0.0, 1000), (0.2, 1000), (0.5, 10_000)])
def test_a_radius_that_is_not_the_truth_is_certified_no_more_often_than_alpha(r: float, n: int, alpha: float) -> None:
    """p at the threshold of r, where certifying any radius above r is wrong, and below it, where r itself is."""
    rng, sigma = np.random.default_rng(1), 0.25
    p = stats.norm.cdf(r / sigma)
    at = certified_radius(rng.binomial(n, p, TRIALS), n, sigma, alpha)
    assert not too_often(int((at > r).sum()), alpha)
    below = certified_radius(rng.binomial(n, p - 0.01, TRIALS), n, sigma, alpha)
    assert not too_often(int((below >= max(r, 1e-12)).sum()), alpha)
    naive = np.maximum(0, sigma * stats.norm.ppf(rng.binomial(n, p, TRIALS) / n))
    assert too_often(int((naive > r).sum()), alpha)


def test_a_probability_far_below_the_threshold_is_never_certified() -> None:
    hits = np.random.default_rng(2).binomial(100_000, 0.45, TRIALS)
    assert certified_radius(hits, 100_000, 0.25, 0.001).max() == 0


# -- the verifier ------------------------------------------------------------------------------------------------------


def half_space(w: Tensor, b: float) -> nn.Module:
    """Class 0 where w.x + b > 0."""
    return nn.Sequential(nn.Flatten(), linear([w.tolist(), (-w).tolist()], [b, -b]))


def test_a_constant_classifier_has_the_largest_radius() -> None:
    net = Forward(lambda s, x: torch.tensor([0.0, 2.0, 1.0]).expand(len(x), 3))
    proof = Smoothing(n=500)(net, images(3), torch.tensor([1, 1, 0]))
    cap = radius_cap(0.25, 500, 0.001)
    assert proof.radius.tolist() == pytest.approx([cap, cap, 0])
    assert proof.status == ("proved", "proved", "open")
    assert proof.predicted.tolist() == [1, 1, 1]
    assert proof.details["hits"].tolist() == [500] * 3
    assert torch.isnan(proof.margin).all()
    assert proof.radius.dtype == torch.float64


def test_a_linear_classifier_is_certified_up_to_its_distance_and_hardly_ever_beyond() -> None:
    """The smoothed half space is itself: the true radius is |w.x + b| / ||w||, approached from below."""
    alpha, w = 0.05, torch.tensor([0.6, -0.8, 0.0, 1.0])
    x = torch.rand(150, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    net = half_space(w, -0.3)
    distance = ((x.flatten(1) @ w - 0.3).abs() / w.norm()).double()
    proof = Smoothing(sigma=0.5, n=2000, alpha=alpha, eps=Fraction(1, 10))(net, x, labels(net, x))
    beyond = int((proof.radius > distance).sum())
    assert stats.binomtest(beyond, 150, alpha, alternative="greater").pvalue > LEVEL
    reachable = (distance > 0.1) & (distance < 0.8)
    assert int(reachable.sum()) > 50
    assert (distance - proof.radius)[reachable].median() < 0.05
    assert (distance - proof.radius)[reachable].max() < 0.2
    certified = torch.tensor([status == "proved" for status in proof.status])
    assert torch.equal(certified, proof.radius >= 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [Smoothing(n=700), Smoothing(n=700, rule="sequential"), Smoothing(n=700, curtail=True)])
def test_a_draw_without_finite_logits_counts_like_a_draw_for_another_class(value: float, rule: Smoothing) -> None:
    third, nothing = torch.tensor([0.0, 0.0, 9.0]), torch.tensor([value, 0.0, 0.0])

    def beyond(logits: Tensor) -> nn.Module:
        """Class 0, but `logits` where the pixel is above 0.7."""
        return Forward(lambda s, x: torch.where(x.flatten(1) > 0.7, logits, torch.tensor([1.0, 0.0, 0.0])))

    x, y = torch.tensor([0.1, 0.5, 0.7, 5.0]).view(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)
    found, wanted = rule(beyond(nothing), x, y), rule(beyond(third), x, y)
    assert torch.equal(found.radius, wanted.radius)
    assert found.radius[0] > 0
    assert found.details["n"][:2].tolist() == wanted.details["n"][:2].tolist()
    assert found.details["hits"][:2].tolist() == wanted.details["hits"][:2].tolist()
    assert (found.status[3], int(found.predicted[3]), int(found.details["hits"][3])) == ("abstain", -1, 0)


def test_an_image_on_the_boundary_abstains() -> None:
    net = half_space(torch.tensor([1.0, 0.0]), -0.5)
    proof = Smoothing(n=400)(net, torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]))
    assert (proof.status, proof.predicted.tolist(), proof.radius.tolist()) == (("abstain",), [-1], [0.0])


def test_a_wrong_label_is_never_certified_and_a_small_radius_stays_open() -> None:
    net, x = half_space(torch.tensor([1.0, 0.0]), -0.5), torch.full((2, 1, 1, 2), 0.75)
    proof = Smoothing(n=400, eps=Fraction(2))(net, x, torch.tensor([0, 1]))
    assert proof.predicted.tolist() == [0, 0]
    assert proof.status == ("open", "open")
    assert proof.radius[0] > 0.1
    assert proof.radius[1] == 0


COUNTING = Smoothing(sigma=0.5, n0=130, n=1037, alpha=0.01, seed=7)


@pytest.fixture
def counted() -> tuple[nn.Module, Tensor, Tensor, list[int]]:
    """A network with close decisions, images, labels, and the hits of one call for all of them."""
    net, x = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 4)), gain=1.0), images(6)
    y = labels(net, x)
    hits = COUNTING(net, x, y).details["hits"].tolist()
    assert all(0 < hit < 1037 for hit in hits)
    return net, x, y, hits


@pytest.mark.parametrize("batch", [1, 100, 250, 999, 10**6])
def test_counts_do_not_depend_on_the_batch_size(counted: tuple[nn.Module, Tensor, Tensor, list[int]], batch: int) -> None:
    net, x, y, hits = counted
    assert replace(COUNTING, batch=batch)(net, x, y).details["hits"].tolist() == hits


def test_counts_do_not_depend_on_the_other_images(counted: tuple[nn.Module, Tensor, Tensor, list[int]]) -> None:
    net, x, y, hits = counted
    parts = [COUNTING(net, x[at], y[at]).details["hits"] for at in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert torch.cat(parts).tolist() == hits
    backwards = COUNTING(net, x.flip(0), y.flip(0)).details["hits"].tolist()
    assert backwards == hits[::-1]


def test_counts_depend_on_the_seed_and_not_on_torchs_generator(counted: tuple[nn.Module, Tensor, Tensor, list[int]]) -> None:
    net, x, y, hits = counted
    state = torch.get_rng_state()
    torch.rand(5)
    again = COUNTING(net, x, y).details["hits"].tolist()
    torch.set_rng_state(state)
    assert again == hits
    COUNTING(net, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert replace(COUNTING, seed=8)(net, x, y).details["hits"].tolist() != hits


class Recorder(nn.Module):
    """Remembers every noisy image it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


def test_every_draw_is_fresh_unclipped_gaussian_noise_of_the_given_sigma() -> None:
    """Selection and estimation share no draw, images share no noise, and nothing is clipped to [0, 1]."""
    net, x = Recorder(), torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.5)])
    Smoothing(sigma=0.5, n0=150, n=420, batch=200)(net, x, torch.tensor([0, 0]))
    seen = torch.cat(net.seen)
    assert len(seen) == 2 * (150 + 420)
    noise = (seen - x.repeat_interleave(570, 0)) / 0.5
    rounded = (noise * 1000).round().flatten(1)
    assert len(rounded.unique(dim=0)) == len(rounded), "no draw is used twice"
    assert seen.min() < -0.5
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > LEVEL
    pixels = noise.flatten(1).T.numpy()
    assert np.abs(np.corrcoef(pixels) - np.eye(16)).max() < 0.2


def test_more_draws_continue_the_same_noise() -> None:
    nets = Recorder(), Recorder()
    for net, n in zip(nets, (200, 500), strict=True):
        Smoothing(n0=100, n=n, batch=100)(net, torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    fewer, more = (torch.cat(net.seen) for net in nets)
    assert torch.equal(more[: len(fewer)], fewer)


def test_noise_seeds_differ_by_seed_image_stream_and_chunk() -> None:
    seeds = {noise_seed(s, image, stream, chunk) for s in range(3) for image in "ab" for stream in ("select", "estimate")
             for chunk in range(50)}
    assert len(seeds) == 3 * 2 * 2 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert CHUNK >= 16, "torch draws fewer than 16 numbers by another rule"


def test_the_class_is_chosen_by_selection_noise_and_counted_on_the_estimation_noise() -> None:
    """A classifier that changes its mind after the n0 selection draws gets no certificate for its first choice."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            number = torch.arange(self.seen, self.seen + len(x))
            self.seen += len(x)
            return torch.stack([(number < 100).float(), (number >= 100).float()], 1)

    proof = Smoothing(n0=100, n=300)(Fickle(), torch.zeros(1, 1, 2, 2), torch.tensor([1]))
    assert proof.details["hits"].tolist() == [0]
    assert (proof.status, proof.radius.tolist()) == (("abstain",), [0.0])


def test_an_empty_batch_has_an_empty_answer() -> None:
    proof = Smoothing(n=100)(half_space(torch.ones(2), 0.0), torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.int64))
    assert (proof.status, proof.radius.shape, proof.predicted.shape) == ((), (0,), (0,))


# -- stopping early ----------------------------------------------------------------------------------------------------

SEQUENTIAL = Smoothing(sigma=0.5, n=4_000, alpha=0.01, seed=7, rule="sequential")
RADII = (Fraction(1, 10), Fraction(1, 4), Fraction(2, 5), Fraction(1))


def looks_of(proof: Proof) -> list[list[list[int]]]:
    """The looks of every sample without the padding."""
    return [[pair for pair in row if pair[0] >= 0] for row in proof.details["looks"].tolist()]


def line_of_images(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A half space and images at growing distances x - 1/2 from its edge; all are of class 0."""
    x = torch.full((count, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] += torch.linspace(0.0, 1.0, count)
    return half_space(torch.tensor([1.0, 0.0]), -0.5), x, torch.zeros(count, dtype=torch.int64)


def test_a_sequential_radius_is_one_of_those_asked_about_and_below_the_distance() -> None:
    net, x, y = line_of_images(60)
    proof = replace(SEQUENTIAL, grid=RADII)(net, x, y)
    distance = (x[:, 0, 0, 0] - 0.5).double()
    asked = [0.0, *map(float, RADII)]
    assert set(proof.radius.tolist()) == set(asked[:4])
    beyond = int((proof.radius > distance).sum())
    assert stats.binomtest(beyond, 60, 0.01, alternative="greater").pvalue > LEVEL
    near = [max(r for r in asked if r <= max(0.0, d - 0.1)) for d in distance.tolist()]
    within_reach = torch.tensor(near, dtype=torch.float64)
    assert (proof.radius >= within_reach.clamp(max=0.4)).all()
    certified = torch.tensor([status == "proved" for status in proof.status])
    assert torch.equal(certified, proof.radius >= 0.25)


def test_a_sequential_run_draws_less_and_stops_for_both_answers() -> None:
    net, x, y = line_of_images(40)
    proof = SEQUENTIAL(net, x, y)
    drawn = proof.details["n"].double()
    proved = torch.tensor([status == "proved" for status in proof.status])
    assert proved.any()
    assert not proved.all()
    for answer in (proved, ~proved):
        assert drawn[answer].min() == 100
        assert drawn[answer].mean() < 1_500
    fixed = replace(SEQUENTIAL, rule="fixed")(net, x, y)
    agree = (fixed.radius >= 0.25) == proved
    assert int((~agree).sum()) <= 2


def test_a_network_sees_no_more_draws_than_are_recorded() -> None:
    net = Recorder()
    proof = SEQUENTIAL(net, torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    assert sum(map(len, net.seen)) == 100 + int(proof.details["n"][0])
    curtailed = Recorder()
    proof = Smoothing(n=5_000, curtail=True, batch=700)(curtailed, torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    assert sum(map(len, curtailed.seen)) == 100 + int(proof.details["n"][0])
    assert int(proof.details["n"][0]) < 5_000


@pytest.mark.parametrize("batch", [1, 250, 10**6])
def test_looks_do_not_depend_on_the_batch_size_or_the_other_images(batch: int) -> None:
    net, x, y = line_of_images(12)
    looks = looks_of(SEQUENTIAL(net, x, y))
    assert looks_of(replace(SEQUENTIAL, batch=batch)(net, x, y)) == looks
    assert looks_of(SEQUENTIAL(net, x.flip(0), y)) == looks[::-1]


def test_looks_are_counts_of_the_noise_that_the_fixed_rule_draws() -> None:
    net, x, y = line_of_images(6)
    for looks, image in zip(looks_of(SEQUENTIAL(net, x, y)), x, strict=True):
        for n, hits in looks:
            fixed = replace(SEQUENTIAL, rule="fixed", n=n)(net, image[None], y[:1])
            assert fixed.details["hits"].tolist() == [hits]


def test_the_radius_follows_from_the_stored_looks_alone() -> None:
    rule = replace(SEQUENTIAL, grid=RADII)
    net, x, y = line_of_images(30)
    proof = rule(net, x, y)
    for looks, radius, n, hits in zip(looks_of(proof), proof.radius, proof.details["n"], proof.details["hits"], strict=True):
        assert looks[-1] == [n, hits]
        assert tuple(at for at, _ in looks) == rule.looks[: len(looks)]
        level, last = decide(np.array([[k for _, k in looks]]), rule.boundaries())
        assert float(radius) == [0.0, *map(float, RADII)][level[0]]
        assert last[0] == len(looks) - 1


def test_curtailment_proves_what_all_draws_would_with_fewer() -> None:
    net, x, y = line_of_images(40)
    rule = Smoothing(sigma=0.5, n=3_000)
    full, short = rule(net, x, y), replace(rule, curtail=True)(net, x, y)
    assert [one == "proved" for one in short.status] == [one == "proved" for one in full.status]
    assert set(short.radius.tolist()) == {0.0, 0.25}
    assert short.details["n"].double().mean() < 2_700
    assert (full.details["n"] == 3_000).all()
    for before, after in zip(full.status, short.status, strict=True):
        assert after == before or (before, after) == ("abstain", "open")


@pytest.mark.parametrize("rule", [
    SEQUENTIAL, Smoothing(sigma=0.5, n=2_000, curtail=True, eps=Fraction(1, 10**6)),
])
def test_early_stopping_abstains_where_no_class_wins_and_certifies_no_wrong_label(rule: Smoothing) -> None:
    net, x, _ = line_of_images(2)
    proof = rule(net, torch.stack([x[0], x[1]]), torch.tensor([0, 1]))
    assert proof.radius.tolist() == [0, 0]
    assert proof.status[1] == "open"
    assert proof.predicted[1] == 0
    never = rule(Forward(Alternating()), x[:1], torch.tensor([0]))
    assert (never.status, never.predicted.tolist()) == (("abstain",), [-1])


class Alternating:
    """Class 0 for the n0 selection draws, then hardly ever."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, s: nn.Module, x: Tensor) -> Tensor:
        first = self.seen == 0
        self.seen += len(x)
        return torch.tensor([1.0, 0.0] if first else [0.0, 1.0]).expand(len(x), 2)


def test_an_empty_batch_has_an_empty_answer_under_every_rule() -> None:
    for rule in (SEQUENTIAL, Smoothing(curtail=True)):
        proof = rule(half_space(torch.ones(2), 0.0), torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.int64))
        assert (proof.status, proof.radius.shape, proof.details["n"].shape) == ((), (0,), (0,))


def test_radii_may_be_texts_and_always_include_eps() -> None:
    rule = Smoothing(rule="sequential", eps=Fraction(1, 4), grid=("0.1", "1/3", 0.5))  # type: ignore[arg-type]
    assert rule.grid == (Fraction(1, 10), Fraction(1, 3), Fraction(1, 2))
    assert rule.radii == (Fraction(1, 10), Fraction(1, 4), Fraction(1, 3), Fraction(1, 2))
    assert Smoothing(rule="sequential").radii == (Fraction(1, 4),)


@pytest.mark.parametrize("fields, named", [
    ({"rule": "lenient"}, "lenient"), ({"grid": (Fraction(1, 4),)}, "grid"), ({"rule": "sequential", "curtail": True}, "curtail"),
    ({"rule": "sequential", "grid": (Fraction(1), Fraction(1, 2))}, "ascend"),
    ({"rule": "sequential", "grid": (Fraction(1), Fraction(1))}, "ascend"),
    ({"rule": "sequential", "grid": (Fraction(0), Fraction(1))}, "above 0"),
    ({"rule": "sequential", "grid": ("wide",)}, "wide"),
    ({"rule": "sequential", "eps": Fraction(0)}, "above 0"), ({"curtail": True, "eps": Fraction(0)}, "above 0"),
    ({"growth": Fraction(1)}, "growth"), ({"futility": 0.0}, "futility"), ({"futility": 1.0}, "futility"),
])
def test_settings_that_do_not_fit_the_rule_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Smoothing(**fields)


@pytest.mark.parametrize("norm", ["linf", "l1", "L2"])
def test_other_norms_are_refused(norm: str) -> None:
    with pytest.raises(ValueError, match=norm):
        Smoothing(norm=norm)


@pytest.mark.parametrize("fields", [
    {"sigma": 0.0}, {"sigma": -0.25}, {"sigma": float("nan")}, {"sigma": float("inf")}, {"n": 0}, {"n0": 0},
    {"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 1.0},
])
def test_senseless_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Smoothing(**fields)  # type: ignore[arg-type]


def test_only_smoothing_is_probabilistic() -> None:
    assert [name for name, verifier in VERIFIERS.items() if not verifier.deterministic] == ["smoothing"]
