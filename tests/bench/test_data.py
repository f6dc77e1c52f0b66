"""Data: fixed splits, equal batches, readers that execute nothing and answer every broken file with one sentence."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bench import readers
from bench.data import AUGMENTATIONS, DATASETS, Dataset, Split, batches, data_folder, load
from bench.errors import UserError

MNIST_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
HERE = data_folder()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(n: int, shape: tuple[int, int, int] = (3, 6, 5)) -> Split:
    """n images of random bytes whose label is their position."""
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=seeded(n))
    return Split(images, torch.arange(n), torch.arange(n), 255.0)


# ---- splits ----------------------------------------------------------------------------------------------------------


def parts(data: Dataset) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def test_the_three_digits_splits_are_disjoint_and_cover_the_1797_images_of_scikit_learn() -> None:
    data, published = load("digits"), load_digits()
    assert [len(part) for part in parts(data)] == [1337, 100, 360]
    assert sorted(torch.cat([part.index for part in parts(data)]).tolist()) == list(range(1797))
    for part in parts(data):
        np.testing.assert_array_equal(part.pixels()[:, 0].numpy(), published.images[part.index] / 16)
        np.testing.assert_array_equal(part.labels, published.target[part.index])


def test_the_digits_splits_never_change() -> None:
    data = load("digits")
    assert [part.digest for part in parts(data)] == [
        "da346cd62b63302dc6f62d2d9d5cbb8c875f101f800e7767a32f7355257cf127",
        "f6e624092d0ff614969d035898d2becd96a5c610a79852a9e2a985bb350c854d",
        "86220af34a966b948769882441599a3e05a0437c6cd56ad54adc36d3f7c9d50b",
    ]
    assert data.digest == "bfe9f387e8784795723d29ddac28f0d1030817cbf128fcc81ac676867491210b"


def test_a_digest_is_the_sha256_of_shape_scale_pixels_and_labels() -> None:
    split = Split(torch.tensor([[[[7, 255]]]], dtype=torch.uint8), torch.tensor([3]), torch.tensor([9]), 255.0)
    assert split.digest == hashlib.sha256(b"(1, 1, 1, 2) 255.0 " + b"\x07\xff" + b"\x03" + bytes(7)).hexdigest()


@pytest.mark.parametrize("field", ["images", "labels", "scale"])
def test_a_digest_changes_with_each_thing_it_stands_for(field: str) -> None:
    fields = {name: getattr(counted(4), name) for name in ("images", "labels", "index", "scale")}
    before = Split(**fields).digest
    assert Split(**{**fields, field: fields[field] + 1}).digest != before
    assert Split(**{**fields, "images": fields["images"].reshape(4, 3, 5, 6)}).digest != before


def test_a_digest_does_not_depend_on_how_the_pixels_lie_in_memory() -> None:
    split = counted(8)
    strided = Split(split.images.to(memory_format=torch.channels_last), split.labels, split.index, split.scale)
    assert strided.images.stride() != split.images.stride()
    assert strided.digest == split.digest == split.to("cpu").digest


def test_pixels_are_float32_in_0_1_and_reach_both_ends() -> None:
    for scale, top in ((255.0, 255), (16.0, 16)):
        images = torch.arange(top + 1, dtype=torch.uint8).reshape(-1, 1, 1, 1)
        split = Split(images, torch.zeros(top + 1), torch.arange(top + 1), scale)
        x = split.pixels()
        assert x.dtype == torch.float32
        np.testing.assert_array_equal(x.flatten().numpy(), np.arange(top + 1, dtype=np.float32) / np.float32(scale))
        assert torch.equal(split.pixels(slice(2, 5)), x[2:5])
        assert torch.equal(split.pixels(torch.tensor([3, 0])), x[[3, 0]])


def test_samples_are_named_by_rule() -> None:
    split = counted(10)
    assert split.first(3).index.tolist() == [0, 1, 2]
    assert split.every(4).index.tolist() == [0, 4, 8]
    assert len(split.first(99)) == 10
    assert torch.equal(split.every(4).images, split.images[[0, 4, 8]])
    for bad in (lambda: split.first(0), lambda: split.every(0)):
        with pytest.raises(UserError, match="at least 1"):
            bad()


# ---- batches and augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, size", [(10, 4), (8, 4), (3, 100), (5, 1)])
def test_an_epoch_shows_each_image_exactly_once_and_keeps_the_short_batch(n: int, size: int) -> None:
    split = counted(n)
    shown = list(batches(split, size, seeded(0)))
    assert [len(y) for _, y in shown] == [size] * (n // size) + [n % size] * (n % size > 0)
    assert sorted(torch.cat([y for _, y in shown]).tolist()) == list(range(n))
    for x, y in shown:
        assert torch.equal(x, split.pixels(y))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_equal_seeds_give_equal_batches_and_the_next_epoch_another_order(augment: str) -> None:
    def epochs() -> list[torch.Tensor]:
        generator = seeded(5)
        return [torch.cat([x for x, _ in batches(counted(50), 16, generator, augment)]) for _ in range(2)]

    first, again = epochs(), epochs()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


def windows(image: np.ndarray, mode: Any = "constant") -> Iterator[np.ndarray]:
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode)
    for top in range(9):
        for left in range(9):
            yield padded[:, top : top + image.shape[1], left : left + image.shape[2]]


@pytest.mark.parametrize("augment, changes", [("crop", 1), ("crop-flip", 2), ("reflect-crop-flip", 2)])
def test_every_augmented_image_is_a_window_of_its_padded_self_and_all_windows_occur(augment: str, changes: int) -> None:
    split = counted(3000, (2, 9, 10))
    image = split.images[0]
    same = Split(image.expand(3000, -1, -1, -1), split.labels, split.index, 255.0)
    (x, _), = batches(same, 3000, seeded(1), augment)  # fmt: skip
    found = list(windows(same.pixels(slice(1))[0].numpy(), "reflect" if "reflect" in augment else "constant"))
    allowed = {window.tobytes() for window in found}
    if "flip" in augment:
        allowed |= {window[:, :, ::-1].tobytes() for window in found}
    seen = {one.tobytes() for one in x.numpy()}
    assert seen == allowed
    assert len(allowed) == 81 * changes


def test_each_image_is_cropped_from_itself_and_drawn_on_its_own() -> None:
    split = counted(40)
    for x, y in batches(split, 16, seeded(2), "crop-flip"):
        moves = []
        for one, position in zip(x.numpy(), y, strict=True):
            own = list(windows(split.pixels(slice(int(position), int(position) + 1))[0].numpy()))
            found = [i for i, w in enumerate(own + [w[:, :, ::-1] for w in own]) if np.array_equal(w, one)]
            assert found
            moves.append(found[0])
        assert len(set(moves)) > len(moves) // 2


def test_half_of_the_images_are_mirrored() -> None:
    mark = torch.zeros(4000, 1, 1, 9, dtype=torch.uint8)
    mark[..., 3:5] = torch.tensor([100, 200], dtype=torch.uint8)
    split = Split(mark, torch.zeros(4000, dtype=torch.int64), torch.arange(4000), 255.0)
    (x, _), = batches(split, 4000, seeded(3), "crop-flip")  # fmt: skip
    rising = (x[..., :-1] < x[..., 1:]) & (x[..., :-1] > 0.3)
    falling = (x[..., :-1] > x[..., 1:]) & (x[..., 1:] > 0.3)
    share = rising.sum() / (rising.sum() + falling.sum())
    assert 0.4 < share < 0.6


def test_wrong_batches_are_refused_at_the_call() -> None:
    with pytest.raises(UserError, match=r"unknown augmentation 'crop-flop'.*crop-flip"):
        batches(counted(3), 2, seeded(0), "crop-flop")
    with pytest.raises(UserError, match="batches of 0 images"):
        batches(counted(3), 0, seeded(0))


# ---- readers on fabricated files -------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def random_images(n: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(seed)
    return draw.randint(0, 256, (n, *shape)).astype(np.uint8), (np.arange(n) % 10).astype(np.uint8)


def write_mnist(folder: Path, pack: bool = False) -> list[np.ndarray]:
    arrays = [*random_images(30, (28, 28), 0), *random_images(7, (28, 28), 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(MNIST_NAMES, arrays, strict=True):
        content = idx(array)
        (folder / (name + ".gz" * pack)).write_bytes(gzip.compress(content) if pack else content)
    return arrays


def whole_train(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation images put back in the published order; fails if one is missing or doubled."""
    index = torch.cat([data.train.index, data.validation.index])
    assert sorted(index.tolist()) == list(range(len(index)))
    images = torch.cat([data.train.images, data.validation.images])[index.argsort()]
    return images.numpy(), torch.cat([data.train.labels, data.validation.labels])[index.argsort()].numpy()


def assert_holds(data: Dataset, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> None:
    for found, expected in zip(whole_train(data), train, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(data.test.images, test[0])
    np.testing.assert_array_equal(data.test.labels, test[1])
    assert data.test.index.tolist() == list(range(len(test[1])))
    assert len(data.validation) == len(train[1]) // 10


@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("pack", [False, True])
def test_mnist_is_read_from_each_place_plain_or_packed(tmp_path: Path, folder: str, pack: bool) -> None:
    arrays = write_mnist(tmp_path / folder, pack)
    data = load("mnist", tmp_path)
    assert data.shape == (1, 28, 28)
    assert_holds(data, (arrays[0][:, None], arrays[1]), (arrays[2][:, None], arrays[3]))
    assert data.note == "not the published MNIST files: 30 training and 7 test images"


def test_the_data_folder_is_the_argument_then_the_variable_then_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSECERT_DATA", raising=False)
    with pytest.raises(UserError, match="into data/MNIST/raw"):
        load("mnist")
    write_mnist(tmp_path / "elsewhere")
    monkeypatch.setenv("SPARSECERT_DATA", str(tmp_path / "elsewhere"))
    assert len(load("mnist").test) == 7
    with pytest.raises(UserError, match="into given/MNIST/raw"):
        load("mnist", "given")


CIFAR = [random_images(4, (3, 32, 32), seed) for seed in range(6)]
CIFAR_TRAIN = (np.concatenate([x for x, _ in CIFAR[:5]]), np.concatenate([y for _, y in CIFAR[:5]]))


def write_binary(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(BATCHES, CIFAR, strict=True):
        rows = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(rows))


def write_python(folder: Path, dump: Callable[[np.ndarray, np.ndarray], bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(BATCHES, CIFAR, strict=True):
        (folder / name).write_bytes(dump(images.reshape(-1, 3072), labels))


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "."])
def test_cifar10_is_read_from_its_binary_files(tmp_path: Path, folder: str) -> None:
    write_binary(tmp_path / folder)
    data = load("cifar10", tmp_path)
    assert_holds(data, CIFAR_TRAIN, CIFAR[5])
    assert data.note == "not the published CIFAR-10 files: 20 training and 4 test images"


def python2_pickle(data: np.ndarray, labels: np.ndarray) -> bytes:
    """The codes that cPickle of Python 2 wrote into the published batches, put together by hand."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    payload = b"T" + struct.pack("<I", data.size) + data.tobytes()
    shape = b"K" + bytes([len(data)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + payload + b"tb"
    numbers = b"]q\x02(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    head = b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"training batch 1 of 5")
    return head + text(b"data") + reconstruct + state + text(b"labels") + numbers + b"u."


def as_text_keys(data: np.ndarray, labels: np.ndarray) -> dict[Any, Any]:
    return {"batch_label": "one", "data": data, "labels": labels.tolist(), "filenames": ["labels", "data"] * 2}


def as_bytes_keys(data: np.ndarray, labels: np.ndarray) -> dict[Any, Any]:
    return {b"batch_label": b"one", b"labels": labels.tolist(), b"data": data.tobytes(), b"filenames": [b"data"]}


def as_arrays(data: np.ndarray, labels: np.ndarray) -> dict[Any, Any]:
    return {"data": np.asfortranarray(data), "labels": labels.astype(">i4")}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", [as_text_keys, as_bytes_keys, as_arrays])
def test_cifar10_is_read_from_pickles_of_every_protocol(
    tmp_path: Path, protocol: int, form: Callable[[np.ndarray, np.ndarray], dict[Any, Any]]
) -> None:
    write_python(tmp_path / "cifar-10-batches-py", lambda *arrays: pickle.dumps(form(*arrays), protocol))
    assert_holds(load("cifar10", tmp_path), CIFAR_TRAIN, CIFAR[5])


def test_cifar10_is_read_from_the_pickles_of_python_2(tmp_path: Path) -> None:
    # the test's own bytes, plain numbers only: Python's own reader agrees that they are such a pickle
    by_library = pickle.loads(python2_pickle(CIFAR[0][0].reshape(-1, 3072), CIFAR[0][1]), encoding="latin1")
    np.testing.assert_array_equal(by_library["data"], CIFAR[0][0].reshape(-1, 3072))
    write_python(tmp_path, python2_pickle)
    assert_holds(load("cifar10", tmp_path), CIFAR_TRAIN, CIFAR[5])


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("whole", [True, False])
def test_a_malicious_pickle_is_refused_and_never_runs(tmp_path: Path, protocol: int, whole: bool) -> None:
    trap = Trap(tmp_path / "sprung")
    write_python(
        tmp_path,
        lambda data, labels: pickle.dumps(trap if whole else {**as_text_keys(data, labels), "more": trap}, protocol),
    )
    with pytest.raises(UserError, match=r"io\.open.*nothing in it was executed") as caught:
        load("cifar10", tmp_path)
    assert "--data-dir" in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "data_batch_1").read_bytes())  # this test's own harmless payload, unpickled on purpose: it is live
    assert (tmp_path / "sprung").exists(), "the trap does not work, so the test proves nothing"


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def jpeg_arrays() -> dict[str, np.ndarray]:
    arrays = {}
    for part, n, seed in (("train", 20, 0), ("test", 6, 1)):
        images, labels = random_images(n, (32, 32, 3), seed)
        files = [jpeg(image) for image in images]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)]).astype(np.int32)
        arrays[f"{part}_labels"] = labels
    return arrays


def write_jpeg(folder: Path, arrays: dict[str, Any]) -> None:
    (folder / "cifar10-jpeg").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar10-jpeg" / "cifar10_jpeg.npz", **arrays)


def by_hand(arrays: dict[str, np.ndarray], part: str) -> tuple[np.ndarray, np.ndarray]:
    buffer, ends = arrays[f"{part}_jpeg"].tobytes(), arrays[f"{part}_offsets"]
    images = [np.asarray(Image.open(io.BytesIO(buffer[a:b]))) for a, b in pairwise(ends)]
    return np.stack(images).transpose(0, 3, 1, 2), arrays[f"{part}_labels"]


def test_cifar10_jpeg_is_what_pillow_decodes_and_says_that_it_is_lossy(tmp_path: Path) -> None:
    arrays = jpeg_arrays()
    write_jpeg(tmp_path, arrays)
    data = load("cifar10-jpeg", tmp_path)
    assert_holds(data, by_hand(arrays, "train"), by_hand(arrays, "test"))
    assert "CIFAR-10 (JPEG q75)" in data.note


def test_decoded_images_are_kept_and_a_broken_or_unusable_cache_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jpeg(tmp_path, jpeg_arrays())
    digest = load("cifar10-jpeg", tmp_path).digest
    source = hashlib.sha256((tmp_path / "cifar10-jpeg" / "cifar10_jpeg.npz").read_bytes()).hexdigest()
    kept = sorted((tmp_path / "cache" / "sparsecert").iterdir())
    assert len(kept) == 2
    assert all(source in path.name and path.suffix == ".npy" for path in kept)
    with monkeypatch.context() as patch:
        patch.setattr(readers, "_decode", lambda *_: pytest.fail("decoded again"))
        assert load("cifar10-jpeg", tmp_path).digest == digest
    kept[0].write_bytes(kept[0].read_bytes()[:-100])
    assert load("cifar10-jpeg", tmp_path).digest == digest
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert load("cifar10-jpeg", tmp_path).digest == digest


# ---- malformed input -------------------------------------------------------------------------------------------------


def refused(name: str, folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(name, folder)
    message = str(caught.value)
    for word in (*words, "--data-dir", "SPARSECERT_DATA"):
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name, missing, place",
    [
        ("mnist", "train-images-idx3-ubyte", "MNIST/raw"),
        ("cifar10", "data_batch_1.bin", "cifar-10-batches-bin"),
        ("cifar10-jpeg", "cifar10_jpeg.npz", "cifar10-jpeg"),
    ],
)
def test_a_missing_file_is_named_with_the_place_to_put_it(tmp_path: Path, name: str, missing: str, place: str) -> None:
    refused(name, tmp_path, f"{missing} is missing", str(tmp_path / place))
    refused(name, tmp_path / "absent", f"{missing} is missing", str(tmp_path / "absent" / place))


def test_of_an_incomplete_set_the_absent_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / MNIST_NAMES[3]).unlink()
    refused("mnist", tmp_path, f"{MNIST_NAMES[3]} is missing", str(tmp_path / "mnist"))
    write_python(tmp_path / "cifar-10-batches-py", lambda data, labels: pickle.dumps(as_text_keys(data, labels)))
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    refused("cifar10", tmp_path, "test_batch is missing", str(tmp_path / "cifar-10-batches-py"))


IMAGES, LABELS = random_images(30, (28, 28), 0)


@pytest.mark.parametrize(
    "file, content, says",
    [
        (0, b"", "not an idx file"),
        (0, idx(IMAGES)[:9], "not an idx file"),
        (0, b"\x00\x00\x0d\x03" + idx(IMAGES)[4:], "not an idx file"),
        (0, idx(LABELS), "not an idx file"),
        (0, idx(IMAGES)[:-1], "has 23,519 bytes where its header promises 23,520"),
        (0, idx(IMAGES) + b"x", "has 23,521 bytes where its header promises 23,520"),
        (0, idx(IMAGES[:, :27]), "27 x 28 pixels instead of 28 x 28"),
        (0, idx(IMAGES[:29]), "has 30 labels for 29 images"),
        (1, idx(LABELS[:-1]), "has 29 labels for 30 images"),
        (1, idx(LABELS + 1), "has the label 10, outside 0..9"),
    ],
)
def test_a_malformed_idx_file_is_named(tmp_path: Path, file: int, content: bytes, says: str) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / MNIST_NAMES[file]).write_bytes(content)
    named = MNIST_NAMES[1] if "labels for" in says else MNIST_NAMES[file]
    refused("mnist", tmp_path, named, says)


def test_an_empty_training_set_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for file, array in ((0, IMAGES[:0]), (1, LABELS[:0])):
        (tmp_path / MNIST_NAMES[file]).write_bytes(idx(array))
    refused("mnist", tmp_path, MNIST_NAMES[1], "holds no images")


def test_a_single_training_image_cannot_be_split(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for file, array in ((0, IMAGES[:1]), (1, LABELS[:1])):
        (tmp_path / MNIST_NAMES[file]).write_bytes(idx(array))
    with pytest.raises(UserError, match="too few to hold out a validation set"):
        load("mnist", tmp_path)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda packed: packed[: len(packed) // 2], id="cut short"),
        pytest.param(lambda packed: flipped(packed, len(packed) - 8), id="wrong check sum"),
        pytest.param(lambda packed: flipped(packed, 10), id="bad block"),
        pytest.param(lambda _: b"plain text", id="no gzip"),
    ],
)
def test_a_corrupt_gzip_file_is_named(tmp_path: Path, broken: Callable[[bytes], bytes]) -> None:
    write_mnist(tmp_path, pack=True)
    path = tmp_path / (MNIST_NAMES[0] + ".gz")
    path.write_bytes(broken(path.read_bytes()))
    refused("mnist", tmp_path, path.name, "cannot be read")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "has 0 bytes"),
        (bytes(3074), "has 3,074 bytes, not a whole number of 3,073-byte records"),
        (b"\x0a" + bytes(3072), "has the label 10, outside 0..9"),
    ],
)
def test_a_malformed_binary_batch_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    write_binary(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    refused("cifar10", tmp_path, "data_batch_3.bin", says)


DATA = CIFAR[0][0].reshape(-1, 3072)
GOOD = pickle.dumps({"data": DATA, "labels": [0, 1, 2, 3]})


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not a CIFAR-10 batch"),
        (b"hello", "not a CIFAR-10 batch"),
        (GOOD[:-20], "not a CIFAR-10 batch"),
        (b"\x80\x02a.", "not a CIFAR-10 batch"),
        (b"\x80\x02u.", "not a CIFAR-10 batch"),
        (b"\x80\x02h\x07.", "not a CIFAR-10 batch"),
        (b"\x80\x02K\x07Q.", "BINPERSID"),
        (pickle.dumps([DATA]), "not a CIFAR-10 batch"),
        (pickle.dumps({"labels": [0, 1, 2, 3]}), "no 'data'"),
        (pickle.dumps({"data": DATA, "fine_labels": [0]}), "no 'labels'"),
        (pickle.dumps({"data": DATA.astype(np.float32), "labels": [0, 1, 2, 3]}), "array of '<f4'"),
        (pickle.dumps({"data": DATA.astype(np.int16), "labels": [0, 1, 2, 3]}), "data int16 (4, 3072)"),
        (pickle.dumps({"data": DATA.reshape(4, 32, 32, 3), "labels": [0, 1, 2, 3]}), "data uint8 (4, 32, 32, 3)"),
        (pickle.dumps({"data": DATA.tobytes()[:-1], "labels": [0, 1, 2, 3]}), "data uint8 (12287,)"),
        (pickle.dumps({"data": DATA[:0], "labels": []}), "data uint8 (0, 3072)"),
        (pickle.dumps({"data": DATA, "labels": [0, 1, 2]}), "has 3 labels for 4 images"),
        (pickle.dumps({"data": DATA, "labels": [0, 1, 2, 10]}), "has the label 10, outside 0..9"),
        (pickle.dumps({"data": DATA, "labels": [0, 1, 2, -1]}), "has the label -1, outside 0..9"),
        (pickle.dumps({"data": DATA, "labels": [0, 1, 2, 1.5]}), "not whole numbers"),
        (pickle.dumps({"data": DATA, "labels": ["0", "1", "2", "3"]}), "not whole numbers"),
        (pickle.dumps({"data": DATA, "labels": 3}), "not a CIFAR-10 batch"),
    ],
)
def test_a_malformed_python_batch_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    write_python(tmp_path, lambda data, labels: pickle.dumps(as_text_keys(data, labels)))
    (tmp_path / "data_batch_2").write_bytes(content)
    refused("cifar10", tmp_path, "data_batch_2", says)


def changed(name: str, change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    arrays: dict[str, Any] = jpeg_arrays()
    return {**arrays, name: change(arrays[name])}


def without_end(offsets: np.ndarray) -> np.ndarray:
    return np.concatenate([offsets[:-1], offsets[-1:] - 1])


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"x": np.zeros(3)}, "train_offsets"),
        (changed("test_labels", lambda labels: labels[:-1]), "has 5 labels for 6 images"),
        (changed("test_labels", lambda labels: labels + 20), "has the label 20, outside 0..9"),
        (changed("test_labels", lambda labels: labels / 2), "not whole numbers"),
        (changed("test_labels", lambda labels: labels.astype(object)), "allow_pickle=False"),
        (changed("train_offsets", lambda offsets: offsets[::-1]), "train_offsets do not divide train_jpeg"),
        (changed("train_offsets", without_end), "train_offsets do not divide train_jpeg"),
        (changed("train_jpeg", lambda files: files.astype(np.int32)), "instead of a row of bytes"),
        (changed("train_jpeg", lambda files: files * 0), "train image 0 is not a readable JPEG file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_jpeg_archive_is_named(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    write_jpeg(tmp_path, arrays)
    refused("cifar10-jpeg", tmp_path, "cifar10_jpeg.npz", says)


@pytest.mark.parametrize("shape", [(31, 32, 3), (32, 32)])
def test_a_jpeg_of_another_size_or_without_colour_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays, odd = jpeg_arrays(), jpeg(np.zeros(shape, np.uint8))
    arrays["test_jpeg"], arrays["test_labels"] = np.frombuffer(odd, np.uint8), np.zeros(1, np.uint8)
    arrays["test_offsets"] = np.array([0, len(odd)])
    write_jpeg(tmp_path, arrays)
    refused("cifar10-jpeg", tmp_path, "test image 0 is not a colour image of 32 x 32 pixels")


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w"):
        pass
    return buffer.getvalue()


def single_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", tar_file(), single_npy(), pickle.dumps([1])])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cifar10_jpeg.npz").write_bytes(content)
    refused("cifar10-jpeg", tmp_path, "cifar10_jpeg.npz is not an .npz file")


def test_a_cut_npz_is_named(tmp_path: Path) -> None:
    write_jpeg(tmp_path, jpeg_arrays())
    path = tmp_path / "cifar10-jpeg" / "cifar10_jpeg.npz"
    path.write_bytes(path.read_bytes()[:-500])
    refused("cifar10-jpeg", tmp_path, "cifar10_jpeg.npz is not an .npz file")


def test_an_unknown_data_set_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"unknown data set 'cifar-10'; did you mean 'cifar10'"):
        load("cifar-10")


def test_the_catalogue_describes_itself() -> None:
    names = ["digits", "mnist", "cifar10", "cifar100", "svhn", "imagenet", "cifar10-jpeg", "cifar10-subset"]
    assert list(DATASETS) == names
    for name, source in DATASETS.items():
        assert len(source.description) > 20
        assert bool(source.files) == bool(source.origin) == (name != "digits")


# ---- the published files, where this machine has them ----------------------------------------------------------------

PUBLISHED_MD5 = {  # of the uncompressed idx files
    "train-images": "6bbc9ace898e44ae57da46a324031adb", "train-labels": "a25bea736e30d166cdddb491f175f624",
    "test-images": "2646ac647ad5339dbf082846283269ea", "test-labels": "27ae3e4e09519cfbb04c329615203637",
}  # fmt: skip
# pytest reports an empty parameter list as a skipped test; a test that is not defined is not skipped.
if list((HERE / "MNIST" / "raw").glob("train-images-idx3-ubyte*")):

    def test_the_published_mnist_comes_back_byte_for_byte() -> None:
        data = load("mnist", HERE)
        assert [len(part) for part in parts(data)] == [55_000, 5_000, 10_000]
        assert data.note == ""
        images, labels = whole_train(data)
        arrays = {"train-images": images[:, 0], "train-labels": labels,
                  "test-images": data.test.images[:, 0].numpy(), "test-labels": data.test.labels.numpy()}  # fmt: skip
        md5 = {name: hashlib.md5(idx(array.astype(np.uint8))).hexdigest() for name, array in arrays.items()}
        assert md5 == PUBLISHED_MD5


if (HERE / "cifar10-jpeg" / "cifar10_jpeg.npz").is_file():

    @pytest.mark.slow  # decodes 60,000 files
    def test_the_real_cifar10_jpeg_is_whole_and_lies_near_the_exact_pixels() -> None:
        data = load("cifar10-jpeg", HERE)
        images, labels = whole_train(data)
        assert np.bincount(labels).tolist() == [5_000] * 10
        assert data.test.labels.bincount().tolist() == [1_000] * 10
        exact = HERE / "cifar10-exact-subset" / "cifar10_exact_subset.npz"
        if exact.is_file():
            with np.load(exact, allow_pickle=False) as arrays:
                assert_near(images[arrays["train_index"]], labels[arrays["train_index"]], arrays, "train", 5.779)
                at = torch.from_numpy(arrays["test_index"].astype(np.int64))
                assert_near(data.test.images[at].numpy(), data.test.labels[at].numpy(), arrays, "test", 5.767)

    def assert_near(images: np.ndarray, labels: np.ndarray, exact: Any, part: str, published: float) -> None:
        """The mean error is the one published with the files; swapped colours, rows or images would be far off."""
        error = np.abs(images.transpose(0, 2, 3, 1).astype(np.int16) - exact[f"{part}_images"]).mean()
        assert error == pytest.approx(published, abs=0.02)
        np.testing.assert_array_equal(labels, exact[f"{part}_labels"])
