"""What is asked of a checkpoint, and everything that is needed to judge it: the network, the images, the tools."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leaderboard.canonical import canonical, sha256_file

from .build import construct, plain
from .cells import Assignment, judging
from .checkpoints import Card, Loaded, classes_of, guess_arch, network, read
from .data import Dataset, Split
from .errors import UserError
from .factors import Stored
from .onnx_files import OnnxNetwork, is_onnx, on_images, read_onnx
from .outside import is_own, own_data, own_file, own_network
from .provenance import code_digest, file_digest, packages, source_digest
from .radii import MinimalDistance
from .run import dataset
from .threat import Threat

DISTANCE = "distance"  # the verifier that brackets minimal distances


@dataclass(frozen=True)
class Question:
    """What is asked of a checkpoint."""

    path: Path
    norm: str
    eps: Fraction
    verifiers: tuple[str, ...]
    attacks: tuple[str, ...]
    arch: str | None = None
    data: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    smoothing: tuple[tuple[str, Any], ...] = ()
    exact: tuple[tuple[str, Any], ...] = ()
    density: Fraction | None = None
    claim: Fraction | None = None
    batch: int = 250
    total_seconds: float | None = None
    curve: tuple[Fraction, ...] = ()
    tolerance: Fraction | None = None
    export: Path | None = None


@dataclass
class Case:
    """Everything that is needed to judge one batch of samples.

    arch_digest: of the user's own network file. plugins: of the files of tools from outside, by label.
    """

    model: nn.Module
    arch: str
    layout: str
    notes: list[str]
    data: Dataset
    samples: Split
    threat: Threat
    attacks: list[Assignment]
    verifiers: list[Assignment]
    fingerprint: str
    digests: Mapping[str, str]
    curve: tuple[Fraction, ...] = ()
    stored: Mapping[str, Stored] = field(default_factory=dict)
    arch_digest: str | None = None
    plugins: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    lowering: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def smoothed(self) -> Assignment | None:
        """The smoothing verifier, when nothing but smoothing was asked: the verdicts are then about the smoothed classifier."""
        probabilistic = [one for one in self.verifiers if not one.tool.deterministic]
        return probabilistic[0] if probabilistic and len(probabilistic) == len(self.verifiers) else None


def prepare(question: Question, device: torch.device) -> Case:
    """Read the checkpoint and the data; raises UserError for anything that does not fit together."""
    if question.export is not None and question.norm != "linf":
        raise UserError(f"--export writes linf balls, which are boxes; VNN-LIB has no {question.norm} balls")
    imported = _imported(question)
    loaded = read(question.path, question.density) if imported is None else Loaded({}, None, imported.layout)
    data = _data(question, loaded, device, None if imported is None else imported.outputs)
    if imported is None:
        arch, model = _network(question, loaded, data)
    else:
        where, mean, std = question.path, question.mean, question.std
        arch, model = where.name, on_images(imported, data.shape, data.classes, where, mean, std)
    model = model.to(device)
    threat: Threat = construct(Threat, {"norm": question.norm, "eps": question.eps}, "the threat")
    attacks, verifiers = _tools(question, threat)
    curve = tuple(construct(Threat, {"norm": question.norm, "eps": eps}, "the threat of --curve").eps for eps in question.curve)
    samples = data.test if question.limit is None else data.test.first(question.limit)
    digests = {"checkpoint": sha256_file(question.path), "samples": samples.digest}
    arch_digest = file_digest(own_file(arch)) if is_own(arch) else None
    sources = {one.label: source_digest(one.tool) for one in (*attacks, *verifiers)}
    plugins = {label: source for label, source in sources.items() if source is not None}
    facts = [
        digests["checkpoint"], arch, str(question.density), question.mean, question.std, plain(threat),
        samples.digest, code_digest(), question.batch, device.type, torch.get_num_threads(),
        [[one.label, plain(one.tool)] for one in (*attacks, *verifiers)], arch_digest, plugins, packages(),
    ]
    fingerprint = hashlib.sha256(canonical(facts)).hexdigest()
    return Case(
        model, arch, loaded.layout, list(loaded.notes), data, samples, threat, attacks, verifiers, fingerprint, digests,
        curve, loaded.stored, arch_digest, plugins,
    )  # fmt: skip


def _imported(question: Question) -> OnnxNetwork | None:
    """The network of an ONNX file; None for files of weights."""
    if not is_onnx(question.path):
        return None
    for option, value in (("--arch", question.arch), ("--density", question.density)):
        if value is not None:
            raise UserError(f"{question.path} is an ONNX file, which holds its own network and weights; leave out {option}")
    return read_onnx(question.path)


def _data(question: Question, loaded: Loaded, device: torch.device, classes: int | None = None) -> Dataset:
    """A known set, or the images of an .npz file, of `classes` where the file of the network says how many."""
    card = loaded.card
    name = question.data or (card.data if card else None)
    if name is None:
        raise UserError(f"{question.path} does not say which data set it was trained on; name it with --data")
    if not name.endswith(".npz"):
        return dataset(name, question.data_dir, device)
    images = own_data(Path(name), card.classes if card else classes)
    if card is None and question.arch and not is_own(question.arch):
        images = own_data(Path(name), classes_of(question.arch, loaded.state, images.shape))
    return images.to(device)


def _network(question: Question, loaded: Loaded, data: Dataset) -> tuple[str, nn.Module]:
    """(its name, the plain network): of the user's own file.py:build, or the architecture that flags, file or shapes say."""
    if question.arch and is_own(question.arch):
        tensors, where = loaded.state, question.path
        return question.arch, own_network(
            question.arch, tensors, data.shape, data.classes, where, question.mean, question.std
        )
    card = _card(question, loaded.state, loaded.card, data)
    return card.arch, network(loaded.state, card, question.path)


def _card(question: Question, state: Mapping[str, Tensor], card: Card | None, data: Dataset) -> Card:
    """What network the tensors belong to: the flags, else what the file says, else the one architecture that fits."""
    arch = question.arch or (card.arch if card else guess_arch(state, data.shape, data.classes))
    if arch is None:
        raise UserError(f"{question.path} fits no known architecture on {data.name}; name its own with --arch and --data")
    mean, std = question.mean, question.std
    if card is not None:
        if (mean or std) and (tuple(mean), tuple(std)) != (tuple(card.mean), tuple(card.std)):
            own = f"its own normalisation (mean {card.mean}, std {card.std})" if card.mean or card.std else "that it has none"
            raise UserError(f"{question.path} says {own}; leave out --mean and --std")
        mean, std = card.mean, card.std
    return Card(arch, data.shape, data.classes, data.name, tuple(mean), tuple(std))


def _tools(question: Question, threat: Threat) -> tuple[list[Assignment], list[Assignment]]:
    base = {"norm": threat.norm, "eps": threat.eps}
    built = [(name, judging("attack", {"name": name, **base})) for name in question.attacks]
    attacks = [Assignment(name, {"name": name}, tool, rest=getattr(tool, "rest", False)) for name, tool in built]
    verifiers = []
    for name in question.verifiers:
        extra = dict({"smoothing": question.smoothing, "exact": question.exact}.get(name, ()))
        verifiers.append(Assignment(name, {"name": name}, judging("verifier", {"name": name, **base, **extra})))
    if question.tolerance is not None:
        verifiers = _with_distances(verifiers, question.tolerance)
    labels = [one.label for one in (*attacks, *verifiers)]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label!r} was asked for twice; name each attack and verifier once")
    return attacks, verifiers


def _with_distances(verifiers: list[Assignment], tolerance: Fraction) -> list[Assignment]:
    if "exact" not in (one.label for one in verifiers):
        raise UserError("--radius brackets the minimal distance by the complete verifier; ask for it with --verifier exact")
    exact = next(one for one in verifiers if one.label == "exact")
    tool = construct(MinimalDistance, {"exact": exact.tool, "tolerance": tolerance}, "--radius")
    return [*verifiers, Assignment(DISTANCE, exact.spec, tool)]
