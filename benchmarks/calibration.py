"""Makes the calibration data of `sparsecert selfcheck`: small networks with exact answers, found without any verifier.

    python -m benchmarks.calibration [FILE]     # default: bench/calibration/known_answers.json, the same bytes every time

A network of affine layers and ReLUs is linear on cells, so its smallest margin in a box lies at a vertex: a point where as
many of these hold as there are pixels: a ReLU's input is zero, a pixel is at its end of the box. All such points are solved
for, activation pattern by activation pattern, in rational arithmetic, and the network itself is evaluated there, so a point
that is no vertex does no harm. The smallest adversarial distance is found likewise, with the distance as one more unknown.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import beta, binom, norm
from torch import nn

from bench.selfcheck import CALIBRATION, network

Row = list[Fraction]
Affine = tuple[list[Row], Row]


def affine_blocks(spec: dict[str, Any]) -> list[Affine]:
    """The affine maps between the ReLUs, read off unit vectors in float64, whose values are taken as exact."""
    net, shape, blocks, part = network(spec).double(), tuple(spec["shape"]), [], []
    for layer in [*net, nn.ReLU()]:
        if not isinstance(layer, nn.ReLU):
            part.append(layer)
            continue
        size = math.prod(shape)
        points = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *shape)
        values = nn.Sequential(*part)(points)
        shape, part = tuple(values.shape[1:]), []
        flat = [[Fraction(v) for v in row] for row in values.flatten(1).tolist()]
        slopes = [[a - b for a, b in zip(row, flat[0])] for row in flat[1:]]
        blocks.append(([list(column) for column in zip(*slopes)], flat[0]))
    return blocks


def apply(block: Affine, x: Sequence[Fraction]) -> Row:
    return [sum((a * b for a, b in zip(row, x)), start) for row, start in zip(*block)]


def value(blocks: list[Affine], x: Row) -> Row:
    """The logits at x."""
    for block in blocks[:-1]:
        x = [max(v, Fraction(0)) for v in apply(block, x)]
    return apply(blocks[-1], x)


def margin(blocks: list[Affine], x: Row, y: int) -> Fraction:
    logits = value(blocks, x)
    return min(logits[y] - logit for j, logit in enumerate(logits) if j != y)


def after(block: Affine, inner: Affine) -> Affine:
    """block(inner(x)) as one affine map."""
    rows = [[sum((a * r[k] for a, r in zip(row, inner[0])), Fraction(0)) for k in range(len(inner[0][0]))] for row in block[0]]
    return rows, apply(block, inner[1])


def patterns(blocks: list[Affine], hidden: int) -> Iterator[tuple[list[tuple[Row, Fraction]], Affine]]:
    """(the planes on which a ReLU of the first `hidden` blocks or of the one after switches, that block's affine map) for
    every pattern of open and closed ReLUs in the first `hidden` blocks."""
    sizes = [len(block[1]) for block in blocks[:hidden]]
    for signs in itertools.product((0, 1), repeat=sum(sizes)):
        current, planes, at = blocks[0], [], 0
        for block, size in zip(blocks[1 : hidden + 1], sizes):
            planes += list(zip(*current))
            open_ = signs[at : at + size]
            current = after(block, ([[s * a for a in row] for row, s in zip(current[0], open_)],
                                    [s * b for b, s in zip(current[1], open_)]))  # fmt: skip
            at += size
        yield planes, current


def solve(rows: Sequence[Row], right: Row) -> Row | None:
    """The one solution of a square system by Gauss's elimination, None where there is not exactly one."""
    table = [[*row, end] for row, end in zip(rows, right)]
    n = len(table)
    for k in range(n):
        pivot = next((i for i in range(k, n) if table[i][k] != 0), None)
        if pivot is None:
            return None
        table[k], table[pivot] = table[pivot], table[k]
        table[k] = [v / table[k][k] for v in table[k]]
        for i in range(n):
            if i != k and table[i][k] != 0:
                factor = table[i][k]
                table[i] = [a - factor * b for a, b in zip(table[i], table[k])]
    return [row[n] for row in table]


def unit(size: int, k: int, last: int = 0) -> Row:
    return [Fraction(int(i == k)) + (last if i == size - 1 and i != k else 0) for i in range(size)]


def smallest_margin(blocks: list[Affine], x: Row, y: int, eps: Fraction) -> Fraction:
    """The smallest f_y - f_j over the linf ball of radius eps cut with [0,1]."""
    ends = [(max(v - eps, Fraction(0)), min(v + eps, Fraction(1))) for v in x]
    faces = [(unit(len(x), k), -end) for k, pair in enumerate(ends) for end in pair]
    points = {tuple(point) for point in itertools.product(*ends)}
    for planes, current in patterns(blocks, len(blocks) - 2) if len(blocks) > 1 else ():
        switches = [*planes, *zip(*current)]
        for chosen in itertools.combinations([*switches, *faces], len(x)):
            point = solve([row for row, _ in chosen], [-shift for _, shift in chosen])
            if point is not None and all(low <= v <= high for v, (low, high) in zip(point, ends)):
                points.add(tuple(point))
    return min(margin(blocks, list(point), y) for point in points)


def smallest_distance(blocks: list[Affine], x: Row, y: int) -> Fraction | None:
    """The smallest linf distance within [0,1] at which f_y is no longer the only largest logit; None where it always is."""
    if margin(blocks, x, y) <= 0:
        return Fraction(0)
    d = len(x)
    faces = [(unit(d + 1, k), -end) for k in range(d) for end in (Fraction(0), Fraction(1))]
    faces += [(unit(d + 1, k, last), -v) for k, v in enumerate(x) for last in (1, -1)]
    best = None
    for planes, logits in patterns(blocks, len(blocks) - 1):
        switches = [([*row, Fraction(0)], shift) for row, shift in planes]
        for j in (j for j in range(len(logits[1])) if j != y):
            row = [a - b for a, b in zip(logits[0][y], logits[0][j])]
            level = ([*row, Fraction(0)], logits[1][y] - logits[1][j])
            for chosen in itertools.combinations([*switches, *faces], d):
                point = solve([level[0], *(row for row, _ in chosen)], [-level[1], *(-shift for _, shift in chosen)])
                if point is None or not all(0 <= v <= 1 for v in point[:d]):
                    continue
                far = max(abs(a - b) for a, b in zip(point[:d], x))
                if (best is None or far < best) and margin(blocks, point[:d], y) <= 0:
                    best = far
    return best


# ---- the networks ----------------------------------------------------------------------------------------------------


def dyadic(generator: np.random.RandomState, *shape: int) -> list[Any]:
    """Random multiples of 1/8 in [-2, 2]: every product and sum of a few is exact in float64."""
    return (generator.randint(-16, 17, size=shape) / 8).tolist()


def linear(weight: list[Any], bias: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    options = {"in_features": len(weight[0]), "out_features": len(weight), "bias": bias is not None}
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return {"kind": "Linear", "options": options, "tensors": tensors, **more}


def random_linear(generator: np.random.RandomState, wide: int, narrow: int) -> dict[str, Any]:
    return linear(dyadic(generator, narrow, wide), dyadic(generator, narrow))


def conv(generator: np.random.RandomState, inside: int, outside: int, kernel: int, **options: int) -> dict[str, Any]:
    weight = dyadic(generator, outside, inside // options.get("groups", 1), kernel, kernel)
    options = {"in_channels": inside, "out_channels": outside, "kernel_size": kernel, **options}
    return {"kind": "Conv2d", "options": options, "tensors": {"weight": weight, "bias": dyadic(generator, outside)}}


RELAXING = ["crown-ibp", "crown", "alpha-crown"]
RELU, FLATTEN = {"kind": "ReLU"}, {"kind": "Flatten"}


def normalize(mean: list[float], std: list[float]) -> dict[str, Any]:
    return {"kind": "Normalize", "options": {"mean": mean, "std": std}}


def pool(**options: Any) -> dict[str, Any]:
    return {"kind": "AvgPool2d", "options": {"kernel_size": 2, "stride": 1, "padding": 1, **options}}


def dense(generator: np.random.RandomState, *widths: int) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = [FLATTEN]
    for wide, narrow in itertools.pairwise(widths):
        layers += [random_linear(generator, wide, narrow), RELU]
    return layers[:-1]


def specs() -> Iterator[dict[str, Any]]:
    """Every network without its answers; `eps` are linf radii, `l2` those of balls around which a net is linear."""
    g = np.random.RandomState(7)
    toy = [FLATTEN, linear([[1, 1], [1, -1]]), RELU, linear([[1, -1], [0, 0]])]
    yield {
        "name": "shared toy", "about": "relu(a + b) - relu(a - b) at (0.6, 0.2)", "shape": [1, 1, 2], "layers": toy,
        "images": [[0.6, 0.2]], "labels": [0], "eps": ["0.3"],
        "values": {"ibp": [-0.6], "crown-ibp": [-6 / 55], "mixtrain": [-6 / 55]},
    }
    yield {"name": "2-4-3", "about": "two layers, two pixels, three classes", "shape": [1, 1, 2], "layers": dense(g, 2, 4, 3),
           "eps": ["1/32"], "distances": True}  # fmt: skip
    yield {"name": "3-4-3-3", "about": "three layers", "shape": [1, 1, 3], "layers": dense(g, 3, 4, 3, 3), "eps": ["1/64"]}
    masked = dense(g, 3, 4, 2)
    masked[1]["mask"] = [[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]]
    yield {"name": "masked", "about": "a pruning hook of torch (U1)", "shape": [1, 1, 3], "layers": masked, "eps": ["1/8"],
           "may_refuse": ["ibp", *RELAXING, "mixtrain", "exact"]}  # fmt: skip
    plane = linear([[3 / 8, 0.5], [0, 0]], [0.25, 0.125])
    yield {"name": "normalised plane", "about": "normalisation first, l2 balls (U2): (3, 4) / 2 is the slope in pixels",
           "shape": [1, 1, 2], "layers": [normalize([0.5], [0.25]), FLATTEN, plane], "eps": [], "l2": ["1/32"],
           "images": [[0.5, 0.5], [0.625, 0.5], [0.5, 0.4375]], "labels": [0, 0, 0]}  # fmt: skip
    grouped = [conv(g, 2, 4, 3, padding=1, groups=2), RELU, FLATTEN, random_linear(g, 8, 2)]
    yield {"name": "grouped", "about": "a convolution in groups (U3)", "shape": [2, 1, 2], "eps": ["1/32"], "layers": grouped}
    dilated = [conv(g, 1, 3, 2, dilation=2, padding=1), RELU, FLATTEN, random_linear(g, 12, 2)]
    yield {"name": "dilated", "about": "a convolution with gaps (U4)", "shape": [1, 2, 2], "eps": ["1/32"], "layers": dilated}
    statistics = {"weight": [1.5, -0.75], "bias": [0.25, -0.125], "running_mean": [0.5, -0.25], "running_var": [0.25, 2.0]}
    batchnorm = {"kind": "BatchNorm2d", "options": {"num_features": 2}, "tensors": statistics}
    front, four = [normalize([0.5], [0.25]), conv(g, 1, 2, 3, padding=1), batchnorm, RELU], {"shape": [1, 2, 2], "eps": ["1/32"]}
    yield {"name": "border, mean", "about": "a shift before a padded convolution, BatchNorm, padded means (U5, U6, U9)", **four,
           "layers": [*front, pool(), FLATTEN, random_linear(g, 18, 2)]}  # fmt: skip
    yield {"name": "unpadded mean", "about": "means that leave out the padding (U7)", **four, "may_refuse": [*RELAXING, "exact"],
           "layers": [*front, pool(count_include_pad=False), FLATTEN, random_linear(g, 18, 2)]}  # fmt: skip
    cancel = [linear([[1e6], [1e6]], [0, -1 / 64]), RELU, linear([[-1, 1], [0, 0]], [1 / 128, 0])]
    yield {"name": "cancelling", "about": "1e6 cancels: float32 sees +1/128 everywhere, the truth is -1/128", "shape": [1, 1, 1],
           "layers": [FLATTEN, *cancel], "images": [[0.6875], [0.75]], "labels": [0, 0], "eps": ["1/1048576"],
           "tolerance": 1e-3, "may_refuse": RELAXING}  # fmt: skip


def balanced(spec: dict[str, Any]) -> list[int]:
    """The labels of the images, once the last bias is moved so that no class is far above the others on all of them."""
    def logits() -> np.ndarray:
        blocks = affine_blocks(spec)
        return np.array([[float(v) for v in value(blocks, [Fraction(v) for v in x])] for x in spec["images"]])

    tensors = spec["layers"][-1]["tensors"]
    tensors["bias"] = (np.array(tensors["bias"]) - np.round(8 * logits().mean(0)) / 8).tolist()
    return [int(label) for label in logits().argmax(1)]


def answered(spec: dict[str, Any], g: np.random.RandomState) -> dict[str, Any]:
    """The network with images, labels and exact answers; the last image has a wrong label where images are random."""
    spec = {"tolerance": 1e-5, **spec}
    if "images" not in spec:
        spec["images"] = (g.randint(0, 65, size=(3, math.prod(spec["shape"]))) / 64).tolist()
        labels = balanced(spec)
        spec["images"].append(spec["images"][-1])
        spec["labels"] = [*labels, 1 - min(labels[-1], 1)]
    blocks = affine_blocks(spec)
    pixels = [[Fraction(float(np.float32(v))) for v in x] for x in spec["images"]]
    pairs = list(zip(pixels, spec["labels"]))
    found = []
    for eps in spec.pop("eps"):
        margins = [float(smallest_margin(blocks, x, y, Fraction(eps))) for x, y in pairs]
        found.append({"norm": "linf", "eps": eps, "margins": margins, "values": spec.pop("values", {})})
    for eps in spec.pop("l2", ()):
        found.append({"norm": "l2", "eps": eps, "margins": [margin_of_a_plane(blocks, x, y, Fraction(eps)) for x, y in pairs]})
    if spec.pop("distances", False):
        spec["distances"] = [float(far) if (far := smallest_distance(blocks, x, y)) is not None else 2.0 for x, y in pairs]
    return {**spec, "balls": found}


def margin_of_a_plane(blocks: list[Affine], x: Row, y: int, eps: Fraction) -> float:
    """The smallest margin of a linear net of two classes in an l2 ball that [0,1] does not cut."""
    ((weight, _),) = blocks
    assert all(eps <= v <= 1 - eps for v in x)
    slope = [a - b for a, b in zip(weight[y], weight[1 - y])]
    return float(margin(blocks, x, y)) - float(eps) * math.hypot(*slope)


# ---- smoothing -------------------------------------------------------------------------------------------------------


def surely(d: float, sigma: float, n: int, alpha: float) -> float:
    """A radius that n draws certify but with a chance of 1e-7, at a distance d from the border."""
    hits = int(binom.ppf(1e-7, n, norm.cdf(d / sigma)))
    p = beta.ppf(alpha, hits, n - hits + 1)
    return float(max(0.0, sigma * norm.ppf(p)))


def smoothed() -> Iterator[dict[str, Any]]:
    sigma, n, alpha = 0.25, 1000, 1e-6
    fields = {"sigma": sigma, "n0": 100, "n": n, "alpha": alpha}
    distances = [0.5, 0.25, 0.125]
    images = [[0.5 + 0.6 * d, 0.5 + 0.8 * d] for d in (*distances, -0.25)]
    sequential = {**fields, "rule": "sequential", "eps": "1/16", "grid": ["1/8", "1/4"], "futility": 0.001}
    yield {
        "name": "smoothed half plane", "about": "the radius is the distance from the border; the last image is on the other side",
        "shape": [1, 1, 2], "layers": [FLATTEN, linear([[3, 4], [0, 0]], [-3.5, 0])], "images": images, "labels": [0] * 4,
        "radii": [d + 1e-6 for d in distances] + [0.0],
        "rules": [
            {"fields": fields, "least": [*(surely(d, sigma, n, alpha) for d in distances), 0.0]},
            {"fields": sequential, "least": [0.125, 0.0625, 0.0, 0.0]},
        ],
    }
    cap = sigma * float(norm.ppf(alpha ** (1 / n)))
    yield {
        "name": "constant", "about": "all draws hit: the largest radius that n draws can prove, none for the other class",
        "shape": [1, 1, 2], "layers": [FLATTEN, linear([[0, 0], [0, 0]], [1, 0])], "images": [[0.25, 0.5]] * 2,
        "labels": [0, 1], "radii": [cap + 1e-9, 0.0], "rules": [{"fields": fields, "least": [cap - 1e-9, 0.0]}],
    }


def radii() -> dict[str, Any]:
    """The check values of the reference of this project (sigma 0.25, alpha 0.001) and the published radii."""
    base = {"sigma": 0.25, "alpha": 0.001}
    rows = [(10_000, 9_900, 0.5531, 5e-5), (10_000, 10_000, 0.79964, 5e-6), (100_000, 99_900, 0.75005, 5e-6), (1000, 500, 0, 0)]
    few = [(110 / 255, 9_640), (0.4347, 9_651), (0.5, 9_818)]
    return {
        "radii": [{**base, "n": n, "hits": hits, "radius": r, "tolerance": off} for n, hits, r, off in rows],
        "fewest": [{**base, "n": 10_000, "radius": radius, "hits": hits} for radius, hits in few],
    }


def main(path: Path) -> None:
    g = np.random.RandomState(11)
    data = {"networks": [answered(spec, g) for spec in specs()], "smoothed": list(smoothed()), **radii()}
    path.write_text(json.dumps(data, indent=None, separators=(",", ":"), allow_nan=False).replace('{"name"', '\n{"name"') + "\n")
    for spec in data["networks"]:
        print(spec["name"], [ball["margins"] for ball in spec["balls"]], spec.get("distances", ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CALIBRATION)
