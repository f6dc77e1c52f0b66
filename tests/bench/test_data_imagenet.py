"""ImageNet from a small made-up folder: decoded once, the same on every call, continued after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from bench import imagenet
from bench.data import batches, load
from bench.data.inventory import survey
from bench.errors import UserError

CLASSES = ("n01440764", "n01443537", "n02105855")
SIZES = ((300, 260), (256, 256), (280, 512), (270, 259))  # width, height


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_image(path: Path, seed: int, mode: str = "RGB", kind: str = "JPEG") -> None:
    """Smooth colours, so that the outcome hardly depends on how a resizer rounds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(SIZES[seed % len(SIZES)], Image.Resampling.BICUBIC).convert(mode).save(path, kind)


def write_folder(root: Path) -> Path:
    for place, name in enumerate(CLASSES):
        for i in range(4):
            write_image(root / "train" / name / f"{name}_{i}.JPEG", 10 * place + i)
        write_image(root / "val" / name / f"ILSVRC2012_val_{place}.JPEG", 100 + place)
    write_image(root / "train" / CLASSES[2] / f"{CLASSES[2]}_2933.JPEG", 40, kind="PNG")  # as one published file is
    write_image(root / "train" / CLASSES[0] / "grey.JPEG", 41, "L")
    write_image(root / "val" / CLASSES[1] / "four_inks.JPEG", 42, "CMYK")
    (root / "train" / CLASSES[0] / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("data")
    write_folder(data_dir / "imagenet")
    return data_dir


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decoding in this process; the list holds what was decoded."""
    seen: list[str] = []

    def in_this_process(paths: Sequence[str], side: int, done: int) -> Iterator[np.ndarray]:
        for path in paths:
            seen.append(path)
            yield imagenet.decode(path, side)

    monkeypatch.setattr(imagenet, "_in_processes", in_this_process)
    return seen


def test_worker_processes_decode_to_the_same_images_as_this_one(folder: Path, tmp_path: Path) -> None:
    names = imagenet.list_images(folder).test
    array, _ = imagenet.decoded(folder / "imagenet" / "val", names, 224)
    for image, name in zip(array, names, strict=True):
        np.testing.assert_array_equal(image, imagenet.decode(str(folder / "imagenet" / "val" / name), 224))


def test_the_parts_are_disjoint_whole_and_labelled_by_their_folder(folder: Path, here: list[str]) -> None:
    data, found = load("imagenet", folder), imagenet.list_images(folder)
    assert (data.classes, data.shape) == (3, (3, 224, 224))
    assert [len(data.train), len(data.validation), len(data.test)] == [13, 1, 4]
    assert sorted([*data.train.index.tolist(), *data.validation.index.tolist()]) == list(range(14))
    for part, names in ((data.train, found.train), (data.validation, found.train), (data.test, found.test)):
        for label, at in zip(part.labels.tolist(), part.index.tolist(), strict=True):
            assert names[at].startswith(CLASSES[label] + "/")
        assert part.pixels().shape == (len(part), 3, 224, 224)
    assert data.note == "not the published ImageNet: 14 training and 4 test images"


@pytest.mark.parametrize("seed", range(4))
def test_a_test_image_is_the_centre_of_the_image_whose_shorter_side_became_256(tmp_path: Path, seed: int) -> None:
    """Against torch's resizing with antialias, which rounds otherwise."""
    write_image(tmp_path / "one.JPEG", seed)
    image = torch.from_numpy(np.asarray(Image.open(tmp_path / "one.JPEG"))).permute(2, 0, 1)[None].float()
    high, wide = image.shape[2:]
    high, wide = (256, 256 * wide // high) if high < wide else (256 * high // wide, 256)
    resized = functional.interpolate(image, (high, wide), mode="bilinear", antialias=True)[0]
    top, left = round((high - 224) / 2), round((wide - 224) / 2)
    expected = resized[:, top : top + 224, left : left + 224].numpy()
    assert np.abs(imagenet.decode(str(tmp_path / "one.JPEG"), 224) - expected).max() < 1.01


def test_training_images_keep_a_wider_square_of_which_networks_see_the_test_crop(folder: Path, here: list[str]) -> None:
    data, found = load("imagenet", folder), imagenet.list_images(folder)
    assert data.train.images.shape == (13, 3, 256, 256)
    for x, at in zip(data.train.pixels(), data.train.index.tolist(), strict=True):
        expected = imagenet.decode(str(found.root / "train" / found.train[at]), 224)
        np.testing.assert_array_equal((x * 255).round().numpy(), expected)


@pytest.mark.parametrize("augment", ["none", "crop-flip", "random-resized-crop"])
def test_every_training_batch_has_the_shape_that_networks_see(folder: Path, here: list[str], augment: str) -> None:
    train = load("imagenet", folder).train
    shown = list(batches(train, 5, torch.Generator().manual_seed(0), augment))
    assert [tuple(x.shape) for x, _ in shown] == [(5, 3, 224, 224), (5, 3, 224, 224), (3, 3, 224, 224)]
    assert all(x.min() >= 0 and x.max() <= 1 for x, _ in shown)
    assert sorted(torch.cat([y for _, y in shown]).tolist()) == sorted(train.labels.tolist())


def test_images_are_decoded_once_and_the_stored_digest_is_that_of_the_pixels(folder: Path, here: list[str]) -> None:
    first = load("imagenet", folder)
    assert len(here) == 18
    again = load("imagenet", folder)
    assert len(here) == 18
    assert again.digest == first.digest
    for part in (again.train, again.validation, again.test):
        assert part.digest == part.at(slice(None)).digest  # a part of a split computes its own
    assert first.train.first(3).digest != first.train.digest


def test_a_killed_decoding_goes_on_where_it_stopped(
    folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = load("imagenet", folder).digest
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(imagenet, "CHUNK", 4)
    usual, here[:] = imagenet._in_processes, []

    def killed(paths: Sequence[str], side: int, done: int) -> Iterator[np.ndarray]:
        for count, image in enumerate(usual(paths, side, done)):
            if count == 10:
                raise KeyboardInterrupt
            yield image

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "_in_processes", killed)
        with pytest.raises(KeyboardInterrupt):
            load("imagenet", folder)
    here.clear()
    assert load("imagenet", folder).digest == whole
    assert len(here) == 18 - 8  # the two whole chunks of four were kept
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_other_files_are_another_array(folder: Path, here: list[str], tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    before = load("imagenet", tmp_path / "copy").digest
    write_image(tmp_path / "copy" / "imagenet" / "val" / CLASSES[0] / "ILSVRC2012_val_0.JPEG", 77)
    assert load("imagenet", tmp_path / "copy").digest != before


def test_an_unreadable_image_is_named(tmp_path: Path, here: list[str]) -> None:
    root = write_folder(tmp_path / "imagenet")
    path = root / "val" / CLASSES[1] / "four_inks.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"four_inks\.JPEG is not a readable image"):
        load("imagenet", tmp_path)


def test_a_worker_says_which_image_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "bad.JPEG").write_text("text")
    with pytest.raises(UserError, match=r"bad\.JPEG is not a readable image"):
        imagenet.decoded(tmp_path, ["bad.JPEG"], 224)


def test_a_folder_that_is_not_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train has no images: put the JPEG files into .*imagenet/train/CLASS"):
        load("imagenet", tmp_path)
    root = write_folder(tmp_path / "imagenet")
    shutil.move(root / "val" / CLASSES[0], root / "val" / "n99999999")
    with pytest.raises(UserError, match="n99999999 is a class that"):
        load("imagenet", tmp_path)
    shutil.rmtree(root / "val")
    assert survey("imagenet", tmp_path).state == "incomplete"


def test_a_disk_without_room_is_refused_before_anything_is_decoded(
    folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"need 2,555,904 bytes .* which has 1,000; set XDG_CACHE_HOME"):
        load("imagenet", folder)
    assert here == []


def test_the_survey_decodes_nothing_and_says_so(folder: Path, here: list[str]) -> None:
    found = survey("imagenet", folder)
    assert (found.state, found.images, found.digest) == ("there", None, None)
    assert "the first use decodes 18 images" in found.note
    assert here == []
    data = load("imagenet", folder)
    assert survey("imagenet", folder).digest == data.digest
