"""CIFAR-100, SVHN, the exact part of CIFAR-10 and a user's own file: read from tiny files in the published formats."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from bench import readers
from bench.data import Dataset, data_folder, load
from bench.errors import UserError
from bench.outside import own_data, own_training_data

HERE = data_folder()


def images_of(n: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, 3, 32, 32)).astype(np.uint8)


FINE = {"train": np.arange(40) % 100 + 60, "test": np.arange(7) * 10}
COARSE = np.arange(40) % 20
IMAGES = {"train": images_of(40, 0), "test": images_of(7, 1)}


def published_order(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation images together, in the order of their index."""
    order = torch.cat([data.train.index, data.validation.index]).argsort()
    images, labels = (torch.cat([getattr(one, what) for one in (data.train, data.validation)]) for what in ("images", "labels"))
    return images[order], labels[order]


def assert_holds(data: Dataset, train: tuple[Any, Any], test: tuple[Any, Any]) -> None:
    images, labels = published_order(data)
    np.testing.assert_array_equal(images, train[0])
    np.testing.assert_array_equal(labels, train[1])
    np.testing.assert_array_equal(data.test.images, test[0])
    np.testing.assert_array_equal(data.test.labels, test[1])


def refused(name: str, folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(name, folder)
    for word in (*words, "--data-dir", "SPARSECERT_DATA"):
        assert word in str(caught.value)


# ---- CIFAR-100 -------------------------------------------------------------------------------------------------------


def write_binary(folder: Path, fine: dict[str, np.ndarray] = FINE) -> None:
    folder.mkdir(parents=True)
    for part, images in IMAGES.items():
        rows = zip(COARSE, fine[part], images, strict=False)
        (folder / f"{part}.bin").write_bytes(b"".join(bytes([c, f]) + x.tobytes() for c, f, x in rows))


def batch_of(part: str) -> dict[str, Any]:
    images, fine = IMAGES[part], FINE[part].tolist()
    return {"data": images.reshape(-1, 3072), "fine_labels": fine, "coarse_labels": COARSE[: len(fine)].tolist()}


def write_python(folder: Path, dump: Callable[[dict[str, Any]], bytes]) -> None:
    folder.mkdir(parents=True)
    for part in IMAGES:
        (folder / part).write_bytes(dump(batch_of(part)))


def test_cifar100_is_read_with_its_fine_labels_from_the_binary_files(tmp_path: Path) -> None:
    write_binary(tmp_path / "cifar-100-binary")
    data = load("cifar100", tmp_path)
    assert (data.classes, data.shape) == (100, (3, 32, 32))
    assert_holds(data, (IMAGES["train"], FINE["train"]), (IMAGES["test"], FINE["test"]))
    assert data.note == "not the published CIFAR-100 files: 40 training and 7 test images"


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_cifar100_is_read_from_the_python_files(tmp_path: Path, protocol: int) -> None:
    write_python(tmp_path / "cifar-100-python", lambda batch: pickle.dumps(batch, protocol))
    assert_holds(load("cifar100", tmp_path), (IMAGES["train"], FINE["train"]), (IMAGES["test"], FINE["test"]))


def test_wrong_cifar100_files_are_named(tmp_path: Path) -> None:
    refused("cifar100", tmp_path, "train.bin is missing", str(tmp_path / "cifar-100-binary"))
    write_binary(tmp_path / "a" / "cifar-100-binary", {**FINE, "test": np.array([0, 1, 2, 3, 4, 5, 100])})
    refused("cifar100", tmp_path / "a", "test.bin", "has the label 100, outside 0..99")
    path = tmp_path / "a" / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused("cifar100", tmp_path / "a", "train.bin", "not a whole number of 3,074-byte records")
    write_python(tmp_path / "b" / "cifar-100-python", lambda batch: pickle.dumps({"data": batch["data"], "labels": [0]}))
    refused("cifar100", tmp_path / "b", "is not a CIFAR-100 batch", "no 'fine_labels'")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_malicious_cifar100_pickle_never_runs(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    write_python(tmp_path / "cifar-100-python", lambda batch: pickle.dumps({**batch, "more": trap}))
    refused("cifar100", tmp_path, "nothing in it was executed")
    assert not (tmp_path / "sprung").exists()


# ---- SVHN ------------------------------------------------------------------------------------------------------------


SVHN_LABELS = {"train": np.arange(40) % 10 + 1, "test": np.array([10, 1, 2, 10, 9, 5, 10])}


def svhn_file(part: str, **changes: Any) -> bytes:
    """A .mat file as published: X uint8 [32, 32, 3, N], y uint8 [N, 1] with 10 for the digit 0."""
    arrays = {"X": IMAGES[part].transpose(2, 3, 1, 0), "y": SVHN_LABELS[part].astype(np.uint8)[:, None], **changes}
    buffer = io.BytesIO()
    savemat(buffer, {name: array for name, array in arrays.items() if array is not None}, do_compression=part == "test")
    return buffer.getvalue()


def write_svhn(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_32x32.mat").write_bytes(svhn_file("train"))
    (folder / "test_32x32.mat").write_bytes(svhn_file("test", **changes))


@pytest.mark.parametrize("folder", ["svhn", "SVHN", "."])
def test_svhn_is_read_and_its_label_10_is_the_digit_0(tmp_path: Path, folder: str) -> None:
    write_svhn(tmp_path / folder)
    data = load("svhn", tmp_path)
    assert data.classes == 10
    digits = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 4
    assert_holds(data, (IMAGES["train"], digits), (IMAGES["test"], [0, 1, 2, 0, 9, 5, 0]))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"X": None}, "no 'X'"),
        ({"y": None}, "no 'y'"),
        ({"X": IMAGES["test"]}, "X is uint8 (7, 3, 32, 32) instead of uint8 (32, 32, 3, N)"),
        ({"X": IMAGES["test"].transpose(2, 3, 1, 0) / 255}, "X is double"),
        ({"y": np.ones((6, 1), np.uint8)}, "y has shape (6, 1) for 7 images"),
        ({"y": np.zeros((7, 1), np.uint8)}, "not whole numbers from 1 to 10"),
        ({"y": np.full((7, 1), 11, np.uint8)}, "not whole numbers from 1 to 10"),
        ({"y": np.full((7, 1), 1.5)}, "not whole numbers from 1 to 10"),
    ],
)
def test_a_mat_file_with_other_arrays_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    write_svhn(tmp_path, **changes)
    refused("svhn", tmp_path, "test_32x32.mat", says)


HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(600)


@pytest.mark.parametrize("content", [b"", b"hello", svhn_file("train")[:-900], svhn_file("test")[:-9], HDF5])
def test_a_file_that_is_no_mat_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_svhn(tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes(content)
    refused("svhn", tmp_path, "train_32x32.mat", "is not a .mat file of SVHN's cropped digits")


# ---- the published files or others -----------------------------------------------------------------------------------


def test_files_of_the_right_counts_are_the_published_ones_only_with_the_published_md5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_svhn(tmp_path)
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    monkeypatch.setattr(readers, "SVHN", replace(readers.SVHN, counts=(40, 7), md5=sums))
    assert load("svhn", tmp_path).note == ""
    monkeypatch.setattr(readers, "SVHN", replace(readers.SVHN, md5={**sums, "test_32x32.mat": "0" * 32}))
    assert load("svhn", tmp_path).note == "not the published SVHN files: another md5 than that of test_32x32.mat"


# ---- the exact part of CIFAR-10 --------------------------------------------------------------------------------------


def subset_arrays() -> dict[str, np.ndarray]:
    return {
        "train_images": IMAGES["train"].transpose(0, 2, 3, 1), "train_labels": np.arange(40) % 10,
        "train_index": np.arange(40) * 1000 + 7, "test_images": IMAGES["test"].transpose(0, 2, 3, 1),
        "test_labels": np.arange(7), "test_index": np.array([0, 1, 2, 3, 90, 800, 9999]),
    }  # fmt: skip


def write_subset(folder: Path, **changes: Any) -> None:
    (folder / "cifar10-exact-subset").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar10-exact-subset" / "cifar10_exact_subset.npz", **{**subset_arrays(), **changes})


def test_the_subset_keeps_the_positions_in_the_published_sets_and_says_that_it_is_a_part(tmp_path: Path) -> None:
    write_subset(tmp_path)
    data = load("cifar10-subset", tmp_path)
    assert_holds(data, (IMAGES["train"], np.arange(40) % 10), (IMAGES["test"], np.arange(7)))
    assert data.test.index.tolist() == [0, 1, 2, 3, 90, 800, 9999]
    assert sorted([*data.train.index.tolist(), *data.validation.index.tolist()]) == [1000 * i + 7 for i in range(40)]
    assert len(data.validation) == 4
    assert data.note.startswith('a part of CIFAR-10: report results as "7 CIFAR-10 test images"')


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"test_images": IMAGES["test"]}, "test_images is uint8 (7, 3, 32, 32)"),
        ({"test_index": np.arange(6)}, "not 7 whole numbers"),
        ({"test_index": np.arange(7)[::-1]}, "test_index does not ascend"),
        ({"test_labels": np.arange(7) + 5}, "has the label 10, outside 0..9"),
        ({"train_labels": np.array([None] * 40)}, "allow_pickle=False"),
    ],
)
def test_a_malformed_subset_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    write_subset(tmp_path, **changes)
    refused("cifar10-subset", tmp_path, "cifar10_exact_subset.npz", says)


if (HERE / "cifar10-exact-subset" / "cifar10_exact_subset.npz").is_file():

    def test_the_real_subset_has_the_pixels_that_its_page_gives_the_sha256_of() -> None:
        data = load("cifar10-subset", HERE)
        images, _ = published_order(data)
        found = [hashlib.sha256(x.permute(0, 2, 3, 1).contiguous().numpy()).hexdigest() for x in (images, data.test.images)]
        assert found == [
            "12506ca01bbaa0d75b3c12b7a1cec9c8b6f8fcafd1fc4284f62d56a0041d04d1",
            "9224954144612fd6ac0fb95683ce3dbdd5c0c8e93f58a4b07af8b9ebb9f77cd5",
        ]
        assert data.test.index[:761].tolist() == list(range(761))
        assert data.note == 'a part of CIFAR-10: report results as "943 CIFAR-10 test images"'


# ---- a user's own file -----------------------------------------------------------------------------------------------


def write_own(path: Path, **changes: Any) -> Path:
    arrays = {
        "x_train": IMAGES["train"], "y_train": np.arange(40) % 3, "x": IMAGES["test"], "y": np.arange(7) % 3, **changes
    }  # fmt: skip
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_file_with_training_images_becomes_a_data_set_with_a_held_out_tenth(tmp_path: Path) -> None:
    data = own_training_data(write_own(tmp_path / "mine.npz"))
    assert [len(data.train), len(data.validation), data.classes] == [36, 4, 3]
    assert_holds(data, (IMAGES["train"], np.arange(40) % 3), (IMAGES["test"], np.arange(7) % 3))
    assert own_training_data(tmp_path / "mine.npz").digest == data.digest


def test_a_file_is_split_as_a_published_set_of_the_same_size(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    own = own_training_data(write_own(tmp_path / "mine.npz"))
    assert own.validation.index.tolist() == load("svhn", tmp_path).validation.index.tolist()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"x_train": None, "y_train": None}, "no arrays x_train and y_train to train on"),
        ({"x_train": None}, "no array 'x_train'"),
        ({"y_train": None}, "no array 'y_train'"),
        ({"x_train": IMAGES["train"][:, :1]}, "images of another shape"),
        ({"x_train": IMAGES["train"] * 1.5}, "the pixels x_train lie in"),
        ({"y_train": np.arange(40) % 3 + 0.5}, "y_train has shape"),
        ({"classes": np.array(2)}, "the label 2 is none of 2 classes"),
        ({"x_train": IMAGES["train"][:1], "y_train": np.zeros(1, int)}, "too few to hold out"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        own_training_data(write_own(tmp_path / "mine.npz", **changes))


def test_a_file_without_training_images_is_still_a_test_set(tmp_path: Path) -> None:
    data = own_data(write_own(tmp_path / "mine.npz", x_train=None, y_train=None))
    assert (len(data.train), len(data.test)) == (0, 7)
