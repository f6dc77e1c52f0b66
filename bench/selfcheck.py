"""Known answers: does this installation still give them? Small networks whose exact margins were found by enumeration."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from leaderboard.canonical import digest, sha256_file
from verifiers import VERIFIERS, Proof, UnsupportedNetworkError, exact_radius
from verifiers.binomial import certified_radius
from verifiers.normalise import Normalize
from verifiers.rounding import in_float64

from .build import build
from .evaluate import predict
from .files import write_json
from .provenance import code_digest, device_name, packages
from .threat import within

CALIBRATION = Path(__file__).parent / "calibration" / "known_answers.json"
STAMP = "selfcheck.json"
L2 = ("ibp", "crown-ibp", "crown", "alpha-crown")  # the deterministic verifiers that know l2 balls
FIELDS: Mapping[str, Mapping[str, Any]] = {"alpha-crown": {"iterations": 2}, "pgd": {"steps": 5}}  # to be quick
RADIUS_TOLERANCE = Fraction(1, 100)  # of the bracket of a smallest adversarial distance


@dataclass(frozen=True)
class Check:
    """One tool on one question of the calibration data; `why` is empty where the answer is right."""

    question: str
    tool: str
    why: str

    @property
    def holds(self) -> bool:
        return not self.why


@dataclass(frozen=True)
class Outcome:
    """What came out: every check, and the digest of the calibration data that they were made on."""

    calibration: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.holds]

    @property
    def digest(self) -> str:
        """sha256 of the calibration data and of whether all checks hold; refusals, which are allowed, take no part."""
        return digest({"calibration": self.calibration, "holds": not self.failed})

    @property
    def sentence(self) -> str:
        if not self.failed:
            return f"selfcheck: all {len(self.checks)} checks against known answers hold"
        first = self.failed[0]
        more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
        return (
            f"selfcheck failed, so nothing this installation certifies can be believed: {first.tool} on {first.question}: "
            f"{first.why}{more}; see `sparsecert selfcheck`"
        )


# ---- the networks ----------------------------------------------------------------------------------------------------

LAYERS: Mapping[str, Callable[..., nn.Module]] = {
    "Linear": nn.Linear, "Conv2d": nn.Conv2d, "BatchNorm2d": nn.BatchNorm2d, "AvgPool2d": nn.AvgPool2d,
    "ReLU": nn.ReLU, "Flatten": nn.Flatten, "Normalize": Normalize,
}


def layer(spec: Mapping[str, Any]) -> nn.Module:
    """The layer {kind, options, tensors, mask} of the calibration data; a mask becomes a hook of torch.nn.utils.prune."""
    made = LAYERS[spec["kind"]](**spec.get("options", {}))
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in spec.get("tensors", {}).items()}
    made.load_state_dict(state, strict=False)
    if "mask" in spec:
        with torch.no_grad():
            prune.custom_from_mask(made, "weight", torch.tensor(spec["mask"], dtype=torch.float32))
    return made


def network(spec: Mapping[str, Any]) -> nn.Sequential:
    """A network of the calibration data in float32 and eval mode."""
    return nn.Sequential(*map(layer, spec["layers"])).eval().requires_grad_(False)


@dataclass(frozen=True)
class Ball:
    """One question about all images of a network: the exact smallest margins [N] of a ball cut with [0,1]."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: Fraction
    margins: Sequence[float]
    tolerance: float
    values: Mapping[str, Sequence[float]]
    may_refuse: Sequence[str]

    def images(self, which: Any) -> str:
        return "image " + ", ".join(str(i) for i in np.flatnonzero(which))


def balls(data: Mapping[str, Any], device: torch.device) -> Iterator[Ball]:
    for spec in data["networks"]:
        model = network(spec).to(device)
        x = torch.tensor(spec["images"], dtype=torch.float32, device=device).view(-1, *spec["shape"])
        y = torch.tensor(spec["labels"], device=device)
        for ball in spec["balls"]:
            yield Ball(
                f"{spec['name']}, {ball['norm']} {ball['eps']}", model, x, y, ball["norm"], Fraction(ball["eps"]),
                ball["margins"], spec["tolerance"], ball.get("values", {}), spec.get("may_refuse", ()),
            )


# ---- the checks ------------------------------------------------------------------------------------------------------


def outcome_on(device: torch.device) -> Outcome:
    """Every shipped verifier and attack on all calibration data, about three seconds on one core."""
    data = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    checks = [*_counts(data), *_smoothed(data, device), *_distances(data, device)]
    for ball in balls(data, device):
        checks += [*_verified(ball), *_attacked(ball)]
    return Outcome(sha256_file(CALIBRATION), tuple(checks))


def _verified(ball: Ball) -> Iterator[Check]:
    """Every deterministic verifier that knows the ball's norm; all of them know linf."""
    for name in VERIFIERS:
        if name == "smoothing" or (ball.norm == "l2" and name not in L2):
            continue
        tool = build("verifier", {"name": name, "norm": ball.norm, "eps": ball.eps, **FIELDS.get(name, {})})
        yield Check(ball.name, name, "; ".join(complaints(tool, ball, name)))


def complaints(tool: Any, ball: Ball, name: str = "") -> Iterator[str]:
    """What is wrong with a deterministic verifier's answers about a ball; of a shipped one, by name, more is known."""
    try:
        proof: Proof = tool(ball.model, ball.x, ball.y)
    except UnsupportedNetworkError as reason:
        if name not in ball.may_refuse:
            yield f"refuses a network that it has a rule for ({reason})"
        return
    except Exception as reason:
        yield f"raises {type(reason).__name__}: {reason}"
        return
    truth, margin = np.array(ball.margins), proof.margin.numpy()
    proved = (proof.radius.numpy() > 0) | (np.array(proof.status) == "proved")
    if (wrong := proved & (truth <= 0)).any():
        yield f"certifies {ball.images(wrong)}, which is not robust (exact margin {truth[wrong][0]:.6g})"
    if (above := margin > truth + ball.tolerance).any():
        yield f"gives {ball.images(above)} the bound {margin[above][0]:.6g}, above the exact margin {truth[above][0]:.6g}"
    if (far := proof.radius.numpy() > float(ball.eps)).any():
        yield f"gives {ball.images(far)} a radius beyond the {ball.eps} that was asked about"
    if name in ball.values and (off := abs(margin - np.array(ball.values[name])) > ball.tolerance).any():
        yield f"gives {ball.images(off)} the bound {margin[off][0]:.6g} instead of its known {ball.values[name]}"
    if getattr(tool, "falsifies", False):
        yield from _incomplete(proof, ball, truth)


def _incomplete(proof: Proof, ball: Ball, truth: np.ndarray) -> Iterator[str]:
    """A complete verifier must say proved or broken wherever the exact margin is not almost zero, and show its witness."""
    status, right = np.array(proof.status), (proof.predicted == ball.y.cpu()).numpy()
    if (missed := (truth > ball.tolerance) & right & (status != "proved")).any():
        yield f"does not prove {ball.images(missed)}, which is robust (exact margin {truth[missed][0]:.6g})"
    if (missed := (truth < -ball.tolerance) & right & (status != "broken")).any():
        yield f"does not break {ball.images(missed)}, which is not robust (exact margin {truth[missed][0]:.6g})"
    broken = torch.from_numpy(status == "broken")
    if broken.any():
        at = broken.to(ball.x.device)
        witness = None if proof.witness is None else proof.witness[broken].to(ball.x)
        if witness is None or not bool(within(witness, ball.x[at], ball.norm, ball.eps).all()):
            yield f"says that {ball.images(broken.numpy())} is broken without a witness inside the ball"
        elif not bool((_in_float64(ball, witness) != ball.y[at]).all()):
            yield f"says that {ball.images(broken.numpy())} is broken by a witness that is classified correctly"


def _in_float64(ball: Ball, x: Tensor) -> Tensor:
    return predict(in_float64(ball.model), x.double())


def _attacked(ball: Ball) -> Iterator[Check]:
    """Attacks stay in the exact ball, and none breaks an image whose exact margin is positive."""
    for name in ("pgd", "fgsm"):
        tool = build("attack", {"name": name, "norm": ball.norm, "eps": ball.eps, **FIELDS.get(name, {})})
        x_adv = tool(ball.model, ball.x.clone(), ball.y.clone())
        outside = ~within(x_adv, ball.x, ball.norm, ball.eps).cpu().numpy()
        broken = (_in_float64(ball, x_adv) != ball.y).cpu().numpy() & (np.array(ball.margins) > ball.tolerance)
        why = f"leaves the ball or [0,1] of {ball.images(outside)}" if outside.any() else ""
        why = why or (f"breaks {ball.images(broken)}, which is robust" if broken.any() else "")
        yield Check(ball.name, name, why)


def _distances(data: Mapping[str, Any], device: torch.device) -> Iterator[Check]:
    """The bracket of the smallest adversarial linf distance, found by `exact`, holds the exact one."""
    for spec in data["networks"]:
        if "distances" not in spec:
            continue
        model = network(spec).to(device)
        x = torch.tensor(spec["images"], dtype=torch.float32, device=device).view(-1, *spec["shape"])
        y, truth = torch.tensor(spec["labels"], device=device), np.array(spec["distances"])
        upper = Fraction(1, 2)
        verifier = build("verifier", {"name": "exact", "eps": upper})
        try:
            lower, higher = (end.numpy() for end in exact_radius(model, x, y, upper, RADIUS_TOLERANCE, verifier))
            off = (lower > truth + spec["tolerance"]) | (higher < np.minimum(truth, 1) - spec["tolerance"])
            off |= (truth < 0.5) & (higher - lower > 2 * float(RADIUS_TOLERANCE))
            why = "" if not off.any() else (
                f"brackets the smallest adversarial distance by {lower[off][0]:.6g} and {higher[off][0]:.6g}, "
                f"but it is {truth[off][0]:.6g}"
            )
        except UnsupportedNetworkError as reason:
            why = f"refuses a network that it has a rule for ({reason})"
        yield Check(f"{spec['name']}, smallest distance", "exact", why)


def _counts(data: Mapping[str, Any]) -> Iterator[Check]:
    """From noise counts to radii: the published check values."""
    for row in data["radii"]:
        found = float(certified_radius(np.array([row["hits"]]), row["n"], row["sigma"], row["alpha"])[0])
        why = "" if abs(found - row["radius"]) <= row["tolerance"] else f"gives the radius {found:.6g}, known is {row['radius']}"
        yield Check(f"{row['hits']} hits of {row['n']}", "smoothing", why)
    for row in data["fewest"]:
        hits = np.array([row["hits"] - 1, row["hits"]])
        below, reached = certified_radius(hits, row["n"], row["sigma"], row["alpha"])
        why = "" if below < row["radius"] <= reached else f"does not reach it first at {row['hits']} hits"
        yield Check(f"radius {row['radius']:.6g} from {row['n']} draws", "smoothing", why)


def _smoothed(data: Mapping[str, Any], device: torch.device) -> Iterator[Check]:
    """Classifiers whose smoothed radius is known: no certificate beyond it, none for another class, and most of it found."""
    for spec in data["smoothed"]:
        model = network(spec).to(device)
        x = torch.tensor(spec["images"], dtype=torch.float32, device=device).view(-1, *spec["shape"])
        y = torch.tensor(spec["labels"], device=device)
        for rule in spec["rules"]:
            radius = build("verifier", {"name": "smoothing", **rule["fields"]})(model, x, y).radius.numpy()
            beyond, short = radius > np.array(spec["radii"]), radius < np.array(rule["least"])
            off = beyond | short
            why = "" if not off.any() else (
                f"certifies radius {radius[off][0]:.6g}, {'beyond the true' if beyond.any() else 'less than the sure'} "
                f"{np.where(beyond, spec['radii'], rule['least'])[off][0]:.6g}"
            )
            yield Check(f"{spec['name']}, {rule['fields'].get('rule', 'fixed')}", "smoothing", why)


# ---- the gate of runs ------------------------------------------------------------------------------------------------


def installation(device: torch.device) -> dict[str, Any]:
    """What a passed selfcheck is about: code, packages, device and calibration data."""
    found = {"code": code_digest(), "packages": packages(), "device": device_name(device)}
    return {**found, "calibration": sha256_file(CALIBRATION)}


def stamp(root: Path, device: torch.device) -> str | None:
    """The digest of the selfcheck that this installation has passed for the run folder `root`, None where it has not."""
    try:
        found = json.loads((root / STAMP).read_text(encoding="utf-8"))
        return str(found["digest"]) if found["installation"] == installation(device) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.cache
def outcome_here(device: torch.device) -> Outcome:
    """The selfcheck of this process, made once."""
    return outcome_on(device)


def gate(root: Path, device: torch.device) -> Outcome | None:
    """None where the run folder's stamp says that this installation has passed; else the outcome, stamped if it passed."""
    if stamp(root, device) is not None:
        return None
    found = outcome_here(device)
    if not found.failed:
        write_json(root / STAMP, {"installation": installation(device), "digest": found.digest, "checks": len(found.checks)})
    return found
