"""Checkpoints: what is saved comes back to the bit; what is broken, foreign or hostile is refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import checkpoints
from bench.checkpoints import Card, guess_arch, load_checkpoint, network, save_checkpoint
from bench.errors import UserError
from bench.methods import LWM
from bench.models import PLAIN, build_model
from bench.phases import fit
from bench.sparsity import density_of, effective_state, keep_largest, mask_layers, weights
from bench.train import Training

SHAPE = (1, 16, 16)
CARD = Card("cnn_small", SHAPE, 10, "digits", facts={"cell": "x"})


def sparse_net(arch: str = "cnn_small", mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> nn.Module:
    model = build_model(arch, SHAPE, 10, mean, std, seed=1)
    mask_layers(model, keep_largest({n: w.abs() for n, w in weights(model).items()}, Fraction("0.05")))
    plain = build_model(arch, SHAPE, 10, mean, std)
    plain.load_state_dict(effective_state(model))
    return plain.eval()


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sparse_net().state_dict().items()}


def opened(path: Path, card: Card = CARD) -> nn.Module:
    """The network of a file by its own card, else by the given one."""
    loaded, own = load_checkpoint(path)
    return network(loaded, own or card, path)


def refused(path: Path, card: Card = CARD) -> str:
    """The one sentence that loading this file, or building its network, ends in."""
    with pytest.raises(UserError) as caught:
        opened(path, card)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("arch", PLAIN)
def test_logits_and_zero_pattern_survive_saving_and_loading(tmp_path: Path, arch: str, suffix: str) -> None:
    model, path, x = sparse_net(arch), tmp_path / f"net{suffix}", torch.rand(5, *SHAPE)
    card = replace(CARD, arch=arch)
    if suffix == ".safetensors":
        save_checkpoint(path, model.state_dict(), card)
    else:
        torch.save(model.state_dict(), path)
    loaded, own = load_checkpoint(path)
    assert own == (card if suffix == ".safetensors" else None)
    again = network(loaded, card, path)
    assert torch.equal(again(x), model(x))
    assert density_of(again) == density_of(model) < Fraction("0.06")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name] == 0, value == 0)
        assert torch.equal(again.state_dict()[name], value)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_card_carries_the_normalisation_and_whatever_facts(tmp_path: Path) -> None:
    model, path = sparse_net(mean=(0.5,), std=(0.25,)), tmp_path / "net.safetensors"
    card = replace(CARD, mean=(0.5,), std=(0.25,), facts={"cell": "ü-1", "n": [1, 2]})
    save_checkpoint(path, model.state_dict(), card)
    loaded, own = load_checkpoint(path)
    assert own == card
    x = torch.rand(3, *SHAPE)
    assert torch.equal(network(loaded, own, path)(x), model(x))
    assert not torch.equal(network(loaded, replace(own, mean=(), std=()), path)(x), model(x))


def test_a_trained_and_pruned_network_is_its_own_checkpoint(
    net_of: Callable[..., nn.Sequential], training_of: Callable[..., Training], tmp_path: Path
) -> None:
    found = fit(net_of(), LWM(), Fraction(1, 10), training_of(pretrain=1, finetune=1))
    save_checkpoint(tmp_path / "net.safetensors", found, CARD)
    loaded, _ = load_checkpoint(tmp_path / "net.safetensors")
    assert loaded.keys() == found.keys()
    assert all(torch.equal(loaded[name], found[name]) for name in found)


def test_safetensors_are_recognised_by_their_content_and_half_precision_is_widened(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "net.bin")
    loaded, own = load_checkpoint(tmp_path / "net.bin")
    assert own is None
    again = network(loaded, CARD, tmp_path / "net.bin")
    assert all(value.dtype == torch.float32 for value in again.state_dict().values())


def test_saving_leaves_no_half_written_file_behind(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_checkpoint(tmp_path / "net.safetensors", {**state, "fc2.weight": state["fc2.weight"].t()}, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


# ---- files that are not whole ----------------------------------------------------------------------------------------


@pytest.fixture(params=["net.safetensors", "net.pt"])
def whole(request: pytest.FixtureRequest, tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / str(request.param)
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_checkpoint(path, state, CARD)
    return path


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_at_every_length(whole: Path, share: float) -> None:
    data = whole.read_bytes()
    whole.write_bytes(data[: int(share * len(data))])
    sentence = refused(whole)
    assert any(words in sentence for words in ("cut off", "is empty", "damaged"))
    assert not any(words in sentence for words in ("Error", "deserializ", "reader", "header", "central directory"))


GARBAGE = [b"hello", b"\x80\x02garbage.", b"PK\x03\x04" + bytes(50), bytes(1000), bytes(range(255, 0, -1)) * 20]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_refused_under_any_name(tmp_path: Path, garbage: bytes) -> None:
    for name in ("net.pt", "net.safetensors", "net.bin"):
        (tmp_path / name).write_bytes(garbage)
        refused(tmp_path / name)


def test_a_flipped_header_byte_is_refused(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    for at in range(0, 40, 3):
        flipped = bytearray(data)
        flipped[at] ^= 0xFF
        whole.write_bytes(bytes(flipped))
        try:
            load_checkpoint(whole)  # a flip may be harmless; it may not be anything but a UserError
        except UserError:
            continue


def test_a_folder_and_a_missing_file_are_no_checkpoints(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "there is no checkpoint" in refused(tmp_path / "nothing.pt")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_file_without_tensors_is_refused(tmp_path: Path, name: str) -> None:
    if name.endswith(".pt"):
        torch.save({}, tmp_path / name)
    else:
        save_file({}, tmp_path / name)
    assert "holds no tensors" in refused(tmp_path / name)


def test_a_file_too_large_for_a_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    with open(path, "wb") as handle:
        handle.truncate(5 * 2**30)  # sparse on disk
    assert "are refused" in refused(path)


def test_an_archive_that_unpacks_to_more_than_a_checkpoint_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"x")
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02") + 24  # the unpacked size in the central directory, 4 GiB at most
    path.write_bytes(data[:at] + struct.pack("<I", 2**32 - 2) + data[at + 4 :])
    monkeypatch.setattr(checkpoints, "LARGEST", 2**31)
    assert "unpacks to more than" in refused(path)


# ---- hostile files ---------------------------------------------------------------------------------------------------


class Runs:
    """Pickled, it creates a file wherever it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def in_a_dict(value: Any) -> Any:
    return {"0.weight": torch.zeros(2), "extra": value}


@pytest.mark.parametrize("wrap", [lambda value: value, in_a_dict, lambda value: [value]])
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle", "zip"])
def test_a_pickled_object_is_refused_and_never_runs(tmp_path: Path, writer: str, wrap: Callable[[Any], Any]) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "net.pt"
    hostile = wrap(Runs(trace))
    if writer == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    elif writer == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(hostile, protocol=2))
            archive.writestr("archive/version", b"3\n")
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=writer == "torch")
    refused(path)
    assert not trace.exists()
    if writer == "torch":  # the test's own harmless payload is live: unpickled on purpose, it runs, so the refusal above counts
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        nn.Linear(2, 2), [torch.zeros(2)], torch.zeros(2), {"state_dict": {"a": torch.zeros(2)}}, {0: torch.zeros(2)},
        {"a": 1.0}, None, "text",
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_not_a_plain_state_dict_is_refused_with_the_way_out(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "net.pt")
    assert "model.state_dict()" in refused(tmp_path / "net.pt")


# ---- other networks' weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [name for name in PLAIN if name != "cnn_small"])
def test_another_architectures_weights_are_refused_by_name(tmp_path: Path, arch: str) -> None:
    save_file(dict(build_model(arch, SHAPE, 10).state_dict()), tmp_path / "net.safetensors")
    assert "is not a checkpoint of cnn_small for 1x16x16 images and 10 classes" in refused(tmp_path / "net.safetensors")


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "fc1.bias"}


@pytest.mark.parametrize(
    "change, complaint",
    [
        (without, "it lacks fc1.bias"),
        (lambda state: {**state, "fc9.bias": torch.zeros(1)}, "it also holds fc9.bias"),
        (lambda state: {**state, "fc2.weight": torch.zeros(7, 100)}, "fc2.weight has shape (7, 100), expected (10, 100)"),
        (lambda state: {**state, "fc2.bias": torch.tensor(0.0)}, "fc2.bias has shape (), expected (10,)"),
        (lambda state: {"conv1.weight": state["conv1.weight"]}, "and more"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(
    tmp_path: Path, state: dict[str, Tensor], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], complaint: str
) -> None:
    save_checkpoint(tmp_path / "net.safetensors", change(state), CARD)
    assert complaint in refused(tmp_path / "net.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(whole: Path, state: dict[str, Tensor], value: float) -> None:
    state["fc1.weight"][3, 4] = value
    if whole.suffix == ".pt":
        torch.save(state, whole)
    else:
        save_checkpoint(whole, state, CARD)
    assert "the tensor 'fc1.weight' holds NaN or infinite values" in refused(whole)


def test_a_float64_weight_beyond_float32_does_not_become_infinity_unseen(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["fc1.weight"] = state["fc1.weight"].double()
    state["fc1.weight"][3, 4] = 1e300
    torch.save(state, tmp_path / "net.pt")
    assert "fc1.weight" in refused(tmp_path / "net.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool], ids=str)
def test_weights_of_an_odd_type_are_read_as_the_same_numbers_or_refused(
    tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    path = tmp_path / "net.pt"
    odd = state["fc2.bias"].to(dtype)
    torch.save({**state, "fc2.bias": odd}, path)
    try:
        loaded, _ = load_checkpoint(path)
        found = network(loaded, CARD, path).state_dict()["fc2.bias"]
    except UserError:
        return
    assert not dtype.is_complex
    assert torch.equal(found, odd.float())


# ---- the header ------------------------------------------------------------------------------------------------------


def words(**changes: Any) -> str:
    return json.dumps({**asdict(CARD), **changes})


@pytest.mark.parametrize(
    "header",
    [
        "not json", "[" * 100_000, words(std=[10**400]), words(mean=[1e300]),
        "[]", "5", "{}", "null", json.dumps({"arch": "cnn_small"}), words(surprise=1),
        words(shape=5), words(shape=None), words(shape=[1, 16]), words(shape=["a", 16, 16]), words(shape=[1, 16.5, 16.5]),
        words(shape=[-1, 16, 16]), words(shape=[0, 16, 16]), words(shape=[1, 10**7, 10**7]),
        words(classes="ten"), words(classes=-1), words(classes=10**11), words(classes=2.5),
        words(arch="resnet"), words(arch=["cnn_small"]), words(arch=None), words(arch="mlp", shape=[4096, 4096, 4096]),
        words(mean=[0.1, 0.2]), words(std=[0.0]), words(mean=["x"]), words(mean=3), words(mean="0.5"),
    ],
)  # fmt: skip
def test_a_header_that_was_tampered_with_is_a_sentence(tmp_path: Path, state: dict[str, Tensor], header: str) -> None:
    path = tmp_path / "net.safetensors"
    save_file(state, path, metadata={"sparsecert": header})
    with pytest.raises(UserError):
        opened(path)


def test_a_safetensors_file_of_others_has_no_card(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "net.safetensors", metadata={"format": "pt"})
    assert load_checkpoint(tmp_path / "net.safetensors")[1] is None


# ---- guessing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", PLAIN)
def test_the_architecture_is_guessed_from_names_and_shapes(arch: str) -> None:
    state = build_model(arch, SHAPE, 10).state_dict()
    assert guess_arch(state, SHAPE, 10) == arch
    assert guess_arch(state, SHAPE, 11) is None
    assert guess_arch({**state, "more": torch.zeros(1)}, SHAPE, 10) is None
    assert guess_arch({}, SHAPE, 10) is None


def test_guessing_passes_over_models_that_do_not_admit_the_images() -> None:
    state = build_model("mlp", (1, 2, 3), 10).state_dict()
    assert guess_arch(state, (1, 2, 3), 10) == "mlp"
