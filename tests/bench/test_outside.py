"""A user's own architecture and images: taken exactly as they are, or refused in one sentence."""

from __future__ import annotations

import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench import outside
from bench.checkpoints import read
from bench.errors import UserError
from bench.outside import is_own, own_data, own_network

SHAPE = (1, 4, 4)
SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs=16, classes=3):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(inputs, 5), nn.BatchNorm1d(5), nn.Linear(5, classes)
    def forward(self, x):
        return self.b(self.norm(self.a(x.flatten(1))).relu())

def build():
    return Net()

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()
    def forward(self, x):
        return self.model(x)

def held():
    return Holder()

def sized(shape, classes):
    return Net(shape[0] * shape[1] * shape[2], classes)

def optional(shape=(1, 2, 2), classes=7):
    return Net(shape[0] * shape[1] * shape[2], classes)

def other(depth=3):
    return Net()

def double():
    return Net().double().train()

def fails():
    raise RuntimeError("first line\\nsecond line")

def nothing():
    return 5

def three():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))

def images():
    return nn.Sequential(nn.Conv2d(1, 3, 1))

def needs(a, b, c):
    return Net()

constant = 3

class Behaves(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.net = how, Net()
    def forward(self, x):
        if self.how == "casts":
            x = x.float()
        if self.how == "writes":
            x.mul_(0.5)
        if self.how == "detaches":
            x = x.detach()
        if self.how == "couples":
            x = x - x.mean(0)
        if self.how == "squeezes" and len(x) == 1:
            raise IndexError("too few")
        if self.how == "gambles":
            x = nn.functional.dropout(x)
        out = self.net(x)
        return out.float() if self.how == "answers" else out
"""
BEHAVES = "".join(
    f"\ndef {how}():\n    return Behaves({how!r})\n"
    for how in ("casts", "writes", "detaches", "couples", "squeezes", "gambles", "answers")
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "own net.py"
    path.write_text(SOURCE + BEHAVES)
    return path


def reference() -> nn.Module:
    torch.manual_seed(1)
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    model: nn.Module = names["build"]().eval()
    return model


@pytest.mark.parametrize("function", ["build", "sized", "optional", "other", "double"])
def test_a_users_network_answers_as_it_does_elsewhere(source: Path, function: str) -> None:
    model, x = reference(), torch.rand(5, *SHAPE)
    again = own_network(f"{source}:{function}", model.state_dict(), SHAPE, 3, source)
    assert torch.equal(again(x), model(x))
    assert not any(layer.training for layer in again.modules())
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_normalisation_goes_in_front(source: Path) -> None:
    model, x = reference(), torch.rand(5, *SHAPE)
    again = own_network(f"{source}:build", model.state_dict(), SHAPE, 3, source, (0.5,), (0.25,))
    assert torch.equal(again(x), model((x - 0.5) / 0.25))
    for mean, std in (((0.5, 0.5), ()), ((0.5,), (0.0,))):
        with pytest.raises(UserError):
            own_network(f"{source}:build", model.state_dict(), SHAPE, 3, source, mean, std)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "module."])
def test_a_part_called_like_a_wrapper_is_found_however_the_file_names_it(source: Path, tmp_path: Path, prefix: str) -> None:
    model, x = reference(), torch.rand(5, *SHAPE)
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "net.pt")
    state = read(tmp_path / "net.pt").state
    for function in ("held", "build"):
        assert torch.equal(own_network(f"{source}:{function}", state, SHAPE, 3, source)(x), model(x))


def test_step_counters_that_old_files_lack_are_not_needed(source: Path) -> None:
    model = reference()
    state = {name: value for name, value in model.state_dict().items() if name != "norm.num_batches_tracked"}
    assert len(state) == len(model.state_dict()) - 1
    again = own_network(f"{source}:build", state, SHAPE, 3, source)
    assert torch.equal(again(torch.ones(2, *SHAPE)), model(torch.ones(2, *SHAPE)))


@pytest.mark.parametrize("function, classes, complaint", [
    ("absent", 3, "has no function 'absent'"), ("constant", 3, "has no function 'constant'"), ("fails", 3, "first line"),
    ("nothing", 3, "returned a int"), ("needs", 3, "failed"), ("build", 4, "must answer an image with 4 logits"),
    ("three", 3, "is not a checkpoint of"), ("sized", 4, "b.weight has shape (3, 5), expected (4, 5)"),
])  # fmt: skip
def test_what_is_wrong_with_a_users_function_is_one_sentence(source: Path, function: str, classes: int, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        own_network(f"{source}:{function}", reference().state_dict(), SHAPE, classes, source)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function, complaint", [("three", "does not take images of 1x4x4"), ("images", "shape (3, 4, 4)")])
def test_networks_that_do_not_classify_the_images_are_refused(source: Path, function: str, complaint: str) -> None:
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    with pytest.raises(UserError) as caught:
        own_network(f"{source}:{function}", names[function]().state_dict(), SHAPE, 3, source)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("how, complaint", [
    ("casts", "no x.float()"), ("answers", "answers float64 images in float32"), ("writes", "writes into the images"),
    ("detaches", "no gradient"), ("couples", "must not be coupled"), ("squeezes", "does not take a single image"),
])  # fmt: skip
def test_networks_that_cannot_be_judged_are_refused_in_one_sentence(source: Path, how: str, complaint: str) -> None:
    state = {f"net.{name}": value for name, value in reference().state_dict().items()}
    with pytest.raises(UserError) as caught:
        own_network(f"{source}:{how}", state, SHAPE, 3, source)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_gambles_is_left_to_the_health_flags(source: Path) -> None:
    state = {f"net.{name}": value for name, value in reference().state_dict().items()}
    assert own_network(f"{source}:gambles", state, SHAPE, 3, source)(torch.ones(2, *SHAPE)).shape == (2, 3)


def test_files_that_are_absent_or_no_python_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def build(:\n")
    for name in ("bad.py", "absent.py"):
        with pytest.raises(UserError, match=name):
            own_network(f"{tmp_path / name}:build", {}, SHAPE, 3, tmp_path)


def test_own_architectures_are_told_from_names() -> None:
    assert [is_own(arch) for arch in ("net.py:build", "/a b/net.py:build", "cnn_small", "module:build", "net.py", "")] == [
        True, True, False, False, False, False
    ]  # fmt: skip


# ---- images ----------------------------------------------------------------------------------------------------------


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)
Y = np.array([0, 1, 2, 3, 0, 1])


def test_bytes_and_floats_and_grey_images_are_the_same_pixels(tmp_path: Path) -> None:
    found = own_data(npz(tmp_path / "a.npz", x=BYTES, y=Y))
    assert torch.equal(found.test.pixels(), torch.from_numpy(BYTES).float() / 255)
    assert (found.shape, found.classes, found.name, found.test.labels.tolist()) == ((3, 5, 4), 4, "a.npz", Y.tolist())
    assert found.test.index.tolist() == list(range(6))
    assert (len(found.train), len(found.validation)) == (0, 0)
    floats = (BYTES / np.float32(255)).astype(np.float32)
    for kind in (">f4", "<f8", np.float32):
        again = own_data(npz(tmp_path / "b.npz", x=floats.astype(kind), y=Y.astype(np.uint8)))
        assert torch.equal(again.test.pixels(), torch.from_numpy(floats))
    grey = own_data(npz(tmp_path / "c.npz", x=BYTES[:, 0], y=Y))
    assert torch.equal(grey.test.pixels(), torch.from_numpy(BYTES[:, :1]).float() / 255)
    assert found.digest == own_data(tmp_path / "a.npz").digest != grey.digest


def test_the_number_of_classes_is_told_else_in_the_file_else_that_of_the_labels(tmp_path: Path) -> None:
    plain, told = npz(tmp_path / "a.npz", x=BYTES, y=Y), npz(tmp_path / "b.npz", x=BYTES, y=Y, classes=7)
    assert (own_data(plain).classes, own_data(plain, 10).classes) == (4, 10)
    assert (own_data(told).classes, own_data(told, 10).classes) == (7, 10)
    assert own_data(npz(tmp_path / "c.npz", x=BYTES, y=Y * 0)).classes == 2
    with pytest.raises(UserError, match="the label 3 is none of 3 classes"):
        own_data(plain, 3)


REFUSED = {
    "no x": ({"y": Y}, "has no array 'x'"),
    "no y": ({"x": BYTES}, "has no array 'y'"),
    "flat": ({"x": BYTES.reshape(6, -1), "y": Y}, "expected images"),
    "empty": ({"x": BYTES[:0], "y": Y[:0]}, "expected images"),
    "wide": ({"x": np.zeros((1, 1, 1, 5000), np.uint8), "y": Y[:1]}, "expected images"),
    "integers": ({"x": BYTES.astype(int), "y": Y}, "has type int64"),
    "complex": ({"x": BYTES * 1j, "y": Y}, "has type complex128"),
    "bytes as floats": ({"x": BYTES.astype(np.float32), "y": Y}, "not in [0,1]"),
    "negative": ({"x": BYTES / 255 - 0.001, "y": Y}, "not in [0,1]"),
    "nan": ({"x": np.full((6, 1, 2, 2), np.nan), "y": Y}, "not in [0,1]"),
    "one nan": ({"x": np.where(np.arange(24).reshape(6, 1, 2, 2) == 7, np.nan, 0.5), "y": Y}, "not in [0,1]"),
    "few labels": ({"x": BYTES, "y": Y[:5]}, "one per image"),
    "float labels": ({"x": BYTES, "y": Y + 0.0}, "whole numbers"),
    "one-hot": ({"x": BYTES, "y": np.eye(4, dtype=int)[Y]}, "whole numbers"),
    "negative labels": ({"x": BYTES, "y": Y - 1}, "expected classes from 0"),
    "huge labels": ({"x": BYTES, "y": Y + 2**62}, "expected classes from 0"),
    "huge unsigned labels": ({"x": BYTES, "y": Y.astype(np.uint64) + np.uint64(2**63)}, "expected classes from 0"),
    "classes": ({"x": BYTES, "y": Y, "classes": [4]}, "one whole number"),
    "text classes": ({"x": BYTES, "y": Y, "classes": "four"}, "one whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arrays_that_are_no_images_with_labels_are_refused_by_name(tmp_path: Path, name: str) -> None:
    arrays, complaint = REFUSED[name]
    with pytest.raises(UserError) as caught:
        own_data(npz(tmp_path / "a.npz", **arrays))
    assert complaint in str(caught.value)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    path = npz(tmp_path / "a.npz", x=np.array([Runs(trace)], dtype=object), y=Y)
    with pytest.raises(UserError):
        own_data(path)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Runs(trace)))
    with pytest.raises(UserError):
        own_data(tmp_path / "b.npz")
    assert not trace.exists()
    np.load(path, allow_pickle=True)["x"]
    assert trace.exists()


def test_a_bomb_an_absent_file_and_a_bare_array_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path / "a.npz", x=BYTES, y=Y)
    monkeypatch.setattr(outside, "LARGEST", 100)
    with pytest.raises(UserError, match="unpacks to more than"):
        own_data(path)
    with pytest.raises(UserError, match="there is no file"):
        own_data(tmp_path / "absent.npz")
    np.save(tmp_path / "b.npy", BYTES)
    with pytest.raises(UserError, match=r"not an \.npz file"):
        own_data(tmp_path / "b.npy")


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 3, 4000, 4000), }"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(10)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(UserError):
        own_data(tmp_path / "a.npz")


def test_damaged_archives_end_in_data_or_in_one_sentence(tmp_path: Path) -> None:
    path, draw, refusals = npz(tmp_path / "a.npz", x=BYTES, y=Y), random.Random(3), 0
    data = path.read_bytes()
    for _ in range(300):
        out = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            out[draw.randrange(len(out))] = draw.randrange(256)
        path.write_bytes(bytes(out[: draw.choice((len(out), draw.randrange(len(out)))) + 1]))
        try:
            found = own_data(path)
        except UserError:
            refusals += 1
        else:
            assert 0 <= float(found.test.pixels().min()) <= float(found.test.pixels().max()) <= 1
    assert refusals > 200
