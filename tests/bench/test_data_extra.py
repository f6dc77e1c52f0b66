"""Pseudo-labelled extra images fill half of every batch; random resized crops; a user's file as the data of a suite."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.cells import Cell, read_suite
from bench.data import Split, batches
from bench.data.batches import _parts
from bench.errors import UserError
from bench.loop import Snapshots, run_phase
from bench.methods import Dense
from bench.phases import phase_key
from bench.run import Folders, dataset, run_cell
from bench.train import Phase, Training

Trainings = Callable[..., Training]
CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(n: int, start: int = 0, shape: tuple[int, int, int] = (1, 8, 8)) -> Split:
    """n images whose label counts from `start`, with the label in every pixel."""
    labels = torch.arange(start, start + n)
    images = labels.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    return Split(images, labels, torch.arange(n), 255.0)


# ---- half and half ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, more, size", [(20, 90, 6), (21, 21, 4), (30, 8, 7), (5, 3, 50)])
def test_every_batch_is_half_original_and_half_extra_and_an_epoch_is_one_pass_over_the_originals(
    n: int, more: int, size: int
) -> None:
    split = counted(n).with_extra(counted(more, 100))
    shown = list(batches(split, size, seeded(0)))
    assert len(shown) == -(-n // size)
    for x, y in shown:
        half = len(y) // 2
        assert (y[:half] < 100).all()
        assert (y[half:] >= 100).all()
        assert len(y) == 2 * half <= 2 * size
        torch.testing.assert_close((x[:, 0, 0, 0] * 255).round().long(), y)
    labels = torch.cat([y for _, y in shown])
    assert sorted(labels[labels < 100].tolist()) == list(range(n))
    drawn = labels[labels >= 100].bincount(minlength=100 + more)[100:]
    assert drawn.sum() == n
    assert drawn.max() - drawn.min() <= 1, "no extra image twice before each was drawn once"


def test_the_originals_come_in_the_order_that_they_have_without_extra_images() -> None:
    plain, mixed = counted(30), counted(30).with_extra(counted(50, 100))
    for (_, y), (_, both) in zip(batches(plain, 8, seeded(3)), batches(mixed, 8, seeded(3)), strict=True):
        assert torch.equal(both[: len(y)], y)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_equal_seeds_draw_equal_extra_images_and_the_next_epoch_draws_others(augment: str) -> None:
    def epochs() -> list[torch.Tensor]:
        generator, split = seeded(5), counted(40).with_extra(counted(100, 100))
        return [torch.cat([x for x, _ in batches(split, 16, generator, augment)]) for _ in range(2)]

    first, again = epochs(), epochs()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


def test_extra_images_may_be_stored_on_another_scale() -> None:
    extra = Split(torch.full((4, 1, 8, 8), 0.25), torch.zeros(4, dtype=torch.int64), torch.arange(4), 1.0)
    (x, _), = batches(counted(4).with_extra(extra), 4, seeded(0))  # fmt: skip
    assert torch.equal(x[4:], torch.full((4, 1, 8, 8), 0.25))


def test_the_extra_images_are_part_of_what_training_data_is() -> None:
    split, extra = counted(10), counted(4, 50)
    mixed = split.with_extra(extra)
    expected = hashlib.sha256((split.digest + extra.digest).encode()).hexdigest()
    assert mixed.digest == mixed.to("cpu").digest == expected
    assert mixed.first(5).digest == split.first(5).with_extra(extra).digest
    assert len(mixed.every(2)) == 5


def test_extra_images_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"extra images have shape \(1, 9, 8\), the training images \(1, 8, 8\)"):
        counted(3).with_extra(counted(3, shape=(1, 9, 8)))


class KilledError(Exception):
    pass


class Kept(Snapshots):
    """The last state, and a stop after so many epochs."""

    def __init__(self, stop: int | None = None, state: dict[str, Any] | None = None) -> None:
        self.stop, self.state, self.count = stop, state, 0

    def load(self) -> dict[str, Any] | None:
        return self.state

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        self.state, self.count = {**state(), "model": {k: v.clone() for k, v in state()["model"].items()}}, self.count + 1
        if self.count == self.stop:
            raise KilledError


def test_a_phase_with_extra_images_goes_on_after_a_kill_as_if_nothing_had_happened(
    toy_of: Callable[..., Split], net_of: Callable[..., nn.Sequential], training_of: Trainings
) -> None:
    training = training_of(data=toy_of(0).with_extra(toy_of(1, 70)), augment="crop-flip")
    phase = Phase("pretrain", 3, 0.1)
    whole, parts, plain = net_of(0), net_of(0), net_of(0)
    run_phase(whole, phase, training)
    kept = Kept(stop=1)
    with pytest.raises(KilledError):
        run_phase(parts, phase, training, kept)
    parts = net_of(1)
    run_phase(parts, phase, training, Kept(state=kept.state))
    run_phase(plain, phase, training_of(data=toy_of(0), augment="crop-flip"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])
    assert not all(torch.equal(value, plain.state_dict()[name]) for name, value in whole.state_dict().items())


def test_other_extra_images_are_another_phase(
    toy_of: Callable[..., Split], net_of: Callable[..., nn.Sequential], training_of: Trainings
) -> None:
    keys = {
        phase_key(net_of(0), Phase("pretrain", 1, 0.1), Dense(), Fraction(1), training_of(data=data))
        for data in (toy_of(0), toy_of(0).with_extra(toy_of(1)), toy_of(0).with_extra(toy_of(2)))
    }
    assert len(keys) == 3


# ---- random resized crops --------------------------------------------------------------------------------------------


def test_the_parts_lie_in_the_image_and_have_the_areas_and_ratios_that_are_asked_for() -> None:
    height, width = 300, 300
    top, left, high, wide = np.array(_parts(4000, height, width, seeded(0))).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()
    share, ratio = high * wide / (height * width), wide / high
    assert 0.078 < share.min() < 0.1
    assert 0.9 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.35
    assert np.median(np.log(ratio)) == pytest.approx(0, abs=0.03)
    assert len({(t, w) for t, w in zip(top, wide, strict=True)}) > 3000


def test_a_part_that_never_fits_is_the_whole_image() -> None:
    """A strip so thin that no part of 8 % of it has a ratio of 3/4 to 4/3."""
    assert _parts(5, 1, 400, seeded(0)) == [[0, 0, 1, 400]] * 5


def test_a_random_resized_crop_is_what_pillow_cuts_out_and_resizes() -> None:
    images = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8, generator=seeded(1))
    split = Split(images, torch.arange(6), torch.arange(6), 255.0, side=28)
    generator = seeded(7)
    order = torch.randperm(6, generator=generator)
    parts = _parts(6, 40, 40, generator)
    (x, y), = batches(split, 6, seeded(7), "random-resized-crop")  # fmt: skip
    assert x.shape == (6, 3, 28, 28)
    assert torch.equal(y, order)
    mirrored = 0
    for one, at, (top, left, high, wide) in zip(x.numpy(), order.tolist(), parts, strict=True):
        planes = [Image.fromarray(plane) for plane in images[at].float().div(255).numpy()]
        cut = [plane.crop((left, top, left + wide, top + high)).resize((28, 28), Image.Resampling.BILINEAR) for plane in planes]
        expected = np.stack([np.asarray(plane) for plane in cut])
        straight, flipped = (np.abs(form - one).max() < 1e-5 for form in (expected, expected[:, :, ::-1]))
        assert straight != flipped
        mirrored += flipped
    assert 0 < mirrored < 6


def test_without_a_side_a_random_resized_crop_keeps_the_size_of_the_image() -> None:
    x, _ = next(batches(counted(4, shape=(3, 32, 32)), 4, seeded(0), "random-resized-crop"))
    assert x.shape == (4, 3, 32, 32)


def test_images_too_large_for_a_device_stay_and_only_what_is_asked_for_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.data.splits.STAY", 10)
    stayed = counted(10).to("meta")
    assert stayed.images.device.type == "cpu"
    assert stayed.device.type == stayed.pixels(slice(3)).device.type == "meta"


# ---- a user's own files in a suite -----------------------------------------------------------------------------------

SUITE = """
[suite]
name = "try"
version = 1
[data]
name = "{name}"
{more}
[threat]
norm = "linf"
eps = "1/20"
[budget]
pretrain = 1
prune = 0
finetune = 0
batch = 16
[grid]
arch = ["mlp"]
density = ["1"]
seed = [0]
[[method]]
name = "dense"
[[objective]]
name = "benign"
[[verifier]]
name = "ibp"
"""


def own_file(path: Path, seed: int, train: bool = True) -> Path:
    draw = np.random.RandomState(seed)

    def images(n: int) -> np.ndarray:
        return draw.randint(0, 256, (n, 1, 8, 8)).astype(np.uint8)

    more = {"x_train": images(50), "y_train": np.arange(50) % 3} if train else {}
    np.savez(path, x=images(30), y=np.arange(30) % 3, **more)
    return path


def cell_of(folder: Path, name: object, more: str = "") -> Cell:
    (folder / "try.toml").write_text(SUITE.format(name=name, more=more))
    (cell,) = read_suite(str(folder / "try.toml")).cells
    return cell


def test_a_suite_trains_on_a_users_file_with_extra_images_and_the_record_holds_both_digests(tmp_path: Path) -> None:
    mine, extra = own_file(tmp_path / "mine.npz", 0), own_file(tmp_path / "extra.npz", 1, train=False)
    plain, mixed = cell_of(tmp_path, mine), cell_of(tmp_path, mine, f'extra = "{extra}"')
    records = [run_cell(cell, Folders(tmp_path / "runs"), CPU) for cell in (plain, mixed)]
    data = records[1]["cell"]["data"]
    assert data["sha256"] == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert data["extra_sha256"] == hashlib.sha256(extra.read_bytes()).hexdigest()
    found = [record["provenance"]["data"] for record in records]
    assert found == [dataset(str(mine), None, CPU).digest, dataset(str(mine), None, CPU, str(extra)).digest]
    assert found[0] != found[1]
    assert records[0]["samples"]["digest"] == records[1]["samples"]["digest"]
    assert len({record["evidence"]["weights_sha256"] for record in records}) == 2


def test_other_images_under_the_same_name_are_another_cell(tmp_path: Path) -> None:
    extra = own_file(tmp_path / "extra.npz", 1)
    before = cell_of(tmp_path, "digits", f'extra = "{extra}"').id
    assert cell_of(tmp_path, "digits", f'extra = "{extra}"').id == before
    own_file(extra, 2)
    assert cell_of(tmp_path, "digits", f'extra = "{extra}"').id != before


@pytest.mark.parametrize(
    "name, more, says",
    [
        ("no.npz", "", "`name` in .data. names no.npz, and there is no such file"),
        ("digits", 'extra = "no.npz"', "`extra` in .data. names no.npz, and there is no such file"),
        ("digits", 'extra = "more.pickle"', "ends in .npz, got 'more.pickle'"),
        ("digits", "extra = 3", "ends in .npz, got 3"),
        ("digits", 'extras = "no.npz"', "unknown field of .data. 'extras'; did you mean 'extra'"),
    ],
)
def test_a_file_that_is_not_there_is_said_before_anything_runs(tmp_path: Path, name: str, more: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cell_of(tmp_path, name, more)


def test_extra_labels_that_the_data_set_has_not_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "extra.npz", x=np.zeros((2, 1, 8, 8), np.uint8), y=np.array([3, 10]))
    with pytest.raises(UserError, match="the label 10 is none of 10 classes"):
        dataset("digits", None, CPU, str(tmp_path / "extra.npz"))


def test_what_the_data_set_says_of_itself_is_a_warning_of_the_record(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{place}" for place in range(1, 6)), "test_batch"):
        rows = np.random.RandomState(len(name)).randint(0, 256, (4, 3073)).astype(np.uint8)
        rows[:, 0] = np.arange(4)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    record = run_cell(cell_of(tmp_path, "cifar10"), Folders(tmp_path / "runs"), CPU, str(tmp_path))
    (warning,) = [one for one in record["checks"]["warnings"] if one.startswith("cifar10: ")]
    assert warning == "cifar10: not the published CIFAR-10 files: 20 training and 4 test images"


def test_the_files_of_the_page_are_made_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    (script,), (table,) = (re.findall(rf"```{language}\n(.*?)```", page, re.S) for language in ("python", "toml"))
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    cell = cell_of(tmp_path, "mine.npz", table.partition('name = "mine.npz"')[2])
    data = dataset(cell.data["name"], None, CPU, cell.data["extra"])
    assert (len(data.train) + len(data.validation), len(data.test), data.shape) == (60, 20, (3, 32, 32))
    assert data.train.extra is not None
    assert len(data.train.extra) == 40
