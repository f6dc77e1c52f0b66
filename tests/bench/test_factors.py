"""Stored forms: what is written is read as the same network, counted as it is stored, or refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import layouts
from bench.checkpoints import Card, network, read, save_checkpoint
from bench.errors import UserError
from bench.factors import Stored, stored_state
from bench.models import build_model
from bench.passport import passport, stored_form
from bench.sparsity import prunable

SHAPE = (1, 8, 8)
CARD = Card("cnn_small", SHAPE, 10, "digits")
WIDTHS = [(3, 5), (4, 4), (6, 2)]  # m < n, m = n, m > n


def draw(*shape: int, seed: int = 0, density: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * (torch.rand(shape, generator=generator) < density)


def atmc(weight: Tensor, seed: int = 0, density: float = 0.3) -> Stored:
    """Random sparse factors of the released parameterisation for a weight of this shape."""
    m, rest = len(weight), weight.shape[1:]
    r, ones = min(m, rest.numel()), (1,) * (weight.dim() - 2)
    parts = {"U": draw(m, r, *ones, seed=seed), "V": draw(r, *rest, seed=seed + 1), "C": draw(*weight.shape, seed=seed + 2)}
    return Stored("atmc", {name: tensor * (draw(*tensor.shape, seed=seed + 3).abs() < density) for name, tensor in parts.items()})


def quantise(tensor: Tensor, levels: int) -> Tensor:
    """The tensor with its non-zeros moved to `levels` values other than 0."""
    book = torch.linspace(-1, 1, 2 * levels)[::2] + 1e-3
    place = (tensor != 0).flatten().cumsum(0).view_as(tensor) % levels
    return torch.where(tensor != 0, book[place], torch.zeros_like(tensor))


def net() -> nn.Module:
    return build_model("cnn_small", SHAPE, 10, seed=1).eval()


def stored_net(make: Callable[[Tensor], Stored]) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """(plain state, stored forms) of a network all of whose weights have a stored form."""
    model = net()
    forms = {f"{name}.weight": make(layer.weight.detach()) for name, layer in prunable(model).items()}
    return {**model.state_dict(), **{name: form.merged for name, form in forms.items()}}, forms


FORMS: dict[str, Callable[[Tensor], Stored]] = {
    "atmc": atmc,
    "atmc quantised": lambda w: Stored("atmc", {k: quantise(t, 7) for k, t in atmc(w).parts.items()}, frozenset("UVC")),
    "lowrank": lambda w: Stored("lowrank", {"U": draw(len(w), 2, *(1,) * (w.dim() - 2)), "V": draw(2, *w.shape[1:])}),
    "codes": lambda w: Stored("plain", {"W": quantise(w * (w > 0), 15)}, frozenset("W")),
}


# ---- the merged weight -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, n", WIDTHS)
def test_at_the_start_of_atmc_the_merged_weight_is_the_dense_one_to_the_bit(m: int, n: int) -> None:
    dense = draw(m, n)
    zero, r = torch.zeros_like(dense), min(m, n)
    parts = {"U": dense, "V": torch.zeros(n, n)} if n <= m else {"U": torch.zeros(m, m), "V": dense}
    assert parts["U"].shape[1] == r
    assert torch.equal(Stored("atmc", {**parts, "C": zero}).merged, dense)


@pytest.mark.parametrize("m, n", WIDTHS)
def test_the_merged_weight_is_the_documented_sum_in_float32(m: int, n: int) -> None:
    """Against numpy's float32 scalars, added in the documented order."""
    form = atmc(torch.zeros(m, n), density=2.0)
    u, v, c = (form.parts[name].numpy() for name in "UVC")
    u, v = (u, v + np.eye(n, dtype=np.float32)) if n <= m else (u + np.eye(m, dtype=np.float32), v)
    for i in range(m):
        for j in range(n):
            total = np.float32(0)
            for k in range(min(m, n)):
                total = np.float32(total + np.float32(u[i, k] * v[k, j]))
            assert form.merged[i, j].item() == np.float32(total + c[i, j])


def test_factors_of_a_convolution_are_two_convolutions_after_each_other() -> None:
    form = Stored("lowrank", {"U": draw(5, 3, 1, 1), "V": draw(3, 2, 3, 3, seed=1)})
    x = draw(4, 2, 6, 6, seed=2)
    chain = nn.functional.conv2d(nn.functional.conv2d(x, form.parts["V"]), form.parts["U"])
    torch.testing.assert_close(nn.functional.conv2d(x, form.merged), chain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (40, 2, 3, 3)])
def test_atmc_of_a_convolution_is_the_matrix_formula(shape: tuple[int, ...]) -> None:
    form = atmc(torch.zeros(shape))
    m, n = shape[0], 9 * shape[1]
    u, v, c = (form.parts[name].flatten(1).double() for name in "UVC")
    wanted = u @ (v + torch.eye(n)) + c if n <= m else (u + torch.eye(m)) @ v + c
    torch.testing.assert_close(form.merged.flatten(1).double(), wanted, rtol=1e-5, atol=1e-5)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_is_written_is_read_as_the_same_network_and_the_same_stored_form(tmp_path: Path, name: str, suffix: str) -> None:
    plain, forms = stored_net(FORMS[name])
    path, state = tmp_path / f"net.{suffix}", stored_state(plain, forms)
    assert not set(forms) & set(state)
    if suffix == "pt":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_checkpoint(path, state, CARD)
    loaded = read(path)
    model = network(loaded.state, CARD, path)
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    assert loaded.stored.keys() == forms.keys()
    for key, form in forms.items():
        own = loaded.stored[key]
        assert (own.kind, own.quantised) == (form.kind, form.quantised)
        assert all(torch.equal(own.parts[part], tensor) for part, tensor in form.parts.items())
    assert "4 weights" in loaded.layout
    assert ("quantised" in loaded.layout) == (name == "atmc quantised")


@pytest.mark.parametrize("levels", [1, 255, 256])
def test_a_code_book_holds_up_to_256_values_beside_zero_in_one_byte_each(tmp_path: Path, levels: int) -> None:
    weight = quantise(draw(40, 30, density=0.9), levels)
    assert len(torch.unique(weight[weight != 0])) == levels
    state = stored_state({"fc.weight": weight}, {"fc.weight": Stored("plain", {"W": weight}, frozenset("W"))})
    assert state["fc.weight.codes"].dtype == torch.uint8
    assert ("fc.weight.mask" in state) == (levels == 256)
    save_file(state, tmp_path / "net.safetensors")
    assert torch.equal(read(tmp_path / "net.safetensors").state["fc.weight"], weight)


def test_a_tensor_of_zeros_has_an_empty_book(tmp_path: Path) -> None:
    weight = torch.zeros(3, 4)
    state = stored_state({"fc.weight": weight}, {"fc.weight": Stored("plain", {"W": weight}, frozenset("W"))})
    save_file(state, tmp_path / "net.safetensors")
    assert torch.equal(read(tmp_path / "net.safetensors").state["fc.weight"], weight)


def test_a_257th_value_or_another_networks_factors_are_not_written() -> None:
    many = torch.arange(1.0, 258.0)[None]
    with pytest.raises(ValueError, match="257 distinct"):
        stored_state({"fc.weight": many}, {"fc.weight": Stored("plain", {"W": many}, frozenset("W"))})
    with pytest.raises(ValueError, match="not the network's weight"):
        stored_state({"fc.weight": many}, {"fc.weight": Stored("plain", {"W": many + 1})})


def whole() -> dict[str, Tensor]:
    plain, forms = stored_net(atmc)
    forms["fc1.weight"] = Stored("plain", {"W": quantise(draw(*plain["fc1.weight"].shape), 9)}, frozenset("W"))
    return stored_state({**plain, "fc1.weight": forms["fc1.weight"].merged}, forms)


BROKEN: dict[str, tuple[str, Tensor | None, str]] = {
    "a missing factor": ("fc2.weight.atmc.C", None, "lacks C"),
    "an unknown factor": ("fc2.weight.atmc.D", torch.ones(2, 2), "unknown part 'D'"),
    "a wrong inner dimension": ("fc2.weight.atmc.V", torch.ones(9, 100), "inner dimensions 10, 9 differ"),
    "a wrong rank": ("conv1.weight.atmc.U", torch.ones(16, 16), "expected"),
    "a residual of another shape": ("fc2.weight.atmc.C", torch.ones(10, 99), "U V has"),
    "factors that are no matrices": ("fc2.weight.atmc.U", torch.ones(10), "expected"),
    "a code outside the book": ("fc1.weight.codes", torch.full((100, 128), 10, dtype=torch.uint8), "known 0 to 9"),
    "a negative code": ("fc1.weight.codes", torch.full((100, 128), -1), "code outside its book"),
    "codes that are no integers": ("fc1.weight.codes", torch.ones(100, 128), "whole numbers"),
    "a missing book": ("fc1.weight.book", None, "has no book"),
    "missing codes": ("fc1.weight.codes", None, "has no codes"),
    "a book with a zero": ("fc1.weight.book", torch.linspace(0, 1, 9), "other than 0"),
    "a book of 257 values": ("fc1.weight.book", torch.linspace(1, 2, 257), "up to 256"),
    "a mask of another shape": ("fc1.weight.mask", torch.ones(3), "mask"),
    "a mask of other values": ("fc1.weight.mask", torch.full((100, 128), 2), "mask"),
    "NaN in a factor": ("fc2.weight.atmc.V", torch.full((10, 100), torch.nan), "NaN"),
    "NaN in a book": ("fc1.weight.book", torch.full((9,), torch.nan), "NaN"),
    "a product beyond float32": ("fc2.weight.atmc.V", torch.full((10, 100), 3e38), "too large"),
    "a plain weight as well": ("fc2.weight", torch.ones(10, 100), "more than one form"),
    "a quantised weight as well": ("fc1.weight", torch.ones(100, 128), "more than one form"),
    "two kinds of factors": ("fc2.weight.lowrank.U", torch.ones(10, 1), "more than one form"),
    "an integer factor": ("fc2.weight.atmc.C", torch.ones(10, 100, dtype=torch.int64), "not float32"),
    "an empty factor": ("fc2.weight.atmc.C", torch.ones(10, 0), "empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_stored_form_is_one_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    key, value, words = BROKEN[name]
    state = {**whole(), key: value}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "net.pt")
    with pytest.raises(UserError) as caught:
        network(read(tmp_path / "net.pt").state, CARD, tmp_path / "net.pt")
    sentence = str(caught.value)
    assert words in sentence
    assert key.split(".")[0] in sentence
    assert "\n" not in sentence


def test_small_factors_of_a_huge_weight_are_refused_before_they_are_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"fc.weight.lowrank.U": torch.ones(900, 1), "fc.weight.lowrank.V": torch.ones(1, 900)}, tmp_path / "net.pt")
    assert read(tmp_path / "net.pt").state["fc.weight"].shape == (900, 900)
    monkeypatch.setattr(layouts, "LARGEST", 1_000_000)
    with pytest.raises(UserError, match="unpacks to more"):
        read(tmp_path / "net.pt")


# ---- the passport ----------------------------------------------------------------------------------------------------


def test_the_passport_counts_the_stored_form_by_hand() -> None:
    """W = U (V + I) + C of a 3x2 weight: non-zeros 2 + 1 + 1 over 6; merged it has 4 of 6."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    parts = {
        "U": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), "V": torch.tensor([[0.0, 2.0], [0.0, 0.0]]),
        "C": torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]),
    }  # fmt: skip
    form = Stored("atmc", parts)
    assert form.merged.tolist() == [[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]]
    model[1].weight.data = form.merged
    found = passport(model.eval(), (1, 1, 2), {"anything.weight": form})
    assert (found["kept"], found["stored"]["kept"], found["stored"]["total"]) == (4, 4, 6)
    # U: 2 equal values, so a book of 32 bits and 0 bits each; V and C: 1 non-zero each, for which a book does not pay
    assert found["stored"]["bits"]["paper"] == 32 + 32 + 32
    assert found["stored"]["bits"]["dense"] == 32 * 6
    assert found["stored"]["layers"]["1"]["parts"]["U"] == {
        "shape": [3, 2], "kept": 2, "distinct_values": 1, "quantised": False
    }  # fmt: skip


def test_a_layer_without_a_stored_form_counts_with_its_plain_weight() -> None:
    model = net()
    assert "stored" not in passport(model, SHAPE)
    found, plain = stored_form(model, {}), passport(model, SHAPE)
    assert (found["kept"], found["bits"]) == (plain["kept"], plain["bits"])


def test_quantised_factors_cost_their_indices_and_books() -> None:
    """Methods.md 6.3's own example: 10,000 non-zeros of 256 values are 88,192 bits."""
    weight = quantise(draw(100, 100), 256)
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    model[0].weight.data = weight
    found = stored_form(model, {"0.weight": Stored("plain", {"W": weight}, frozenset("W"))})
    assert (found["kept"], found["bits"]["paper"]) == (10_000, 88_192)


def test_the_example_of_the_page_writes_a_file_that_is_read_as_its_network(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "checkpoint_layouts.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    names: dict[str, Any] = {"path": tmp_path / "net.safetensors"}
    exec(code, names)
    loaded = read(tmp_path / "net.safetensors")
    assert torch.equal(loaded.state["fc.weight"], names["plain"]["fc.weight"])
    assert "ATMC factors" in loaded.layout
