"""Foreign layouts: each is the same network as plain torch says, or one sentence; no file runs anything or crashes the reader."""

from __future__ import annotations

import copy
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from bench import layouts
from bench.checkpoints import Card, classes_of, guess_arch, network, read, save_checkpoint
from bench.errors import UserError
from bench.models import build_model
from bench.sparsity import Mask, TopKScores, attach, keep_largest, kept_of, mask_layers, prunable, weights

SHAPE = (1, 8, 8)
CARD = Card("cnn_small", SHAPE, 10, "digits")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
X = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(3))


def net(arch: str = "cnn_small", seed: int = 1) -> nn.Module:
    return build_model(arch, SHAPE, 10, seed=seed).eval()


def masked(model: nn.Module) -> nn.Module:
    """The network with four fifths of each layer's weights at zero, by plain tensor code."""
    with torch.no_grad():
        for layer in prunable(model).values():
            layer.weight.mul_(layer.weight.abs() > layer.weight.abs().quantile(0.8))
    return model


def as_read(path: Path, density: Fraction | None = None, card: Card = CARD) -> nn.Module:
    return network(read(path, density).state, card, path)


def refused(path: Path, density: Fraction | None = None) -> str:
    with pytest.raises(UserError) as caught:
        as_read(path, density)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def saved(value: Any, path: Path, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


# ---- files and nests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.pth.tar", "net.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_of_torch_are_read_zipped_and_legacy_under_any_name(tmp_path: Path, name: str, zipped: bool) -> None:
    model = masked(net())
    path = saved(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert torch.equal(as_read(path)(X), model(X))
    assert read(path).layout == ("torch file" if zipped else "legacy torch file")


def test_safetensors_keep_their_card(tmp_path: Path) -> None:
    model = masked(net())
    save_checkpoint(tmp_path / "net.safetensors", model.state_dict(), CARD)
    found = read(tmp_path / "net.safetensors")
    assert (found.card, found.layout, found.notes) == (CARD, "safetensors", ())
    assert torch.equal(as_read(tmp_path / "net.safetensors")(X), model(X))


@pytest.mark.parametrize("nest", layouts.NESTS)
def test_weights_are_found_under_every_usual_key_beside_other_things(tmp_path: Path, nest: str) -> None:
    model = net()
    other = {"epoch": 3, "arch": "cnn_small", "best_prec1": torch.tensor(0.5), "optimizer": {"state": {}, "param_groups": [1]}}
    path = saved({**other, nest: model.state_dict()}, tmp_path / "net.pt")
    assert torch.equal(as_read(path)(X), model(X))
    assert f"nested under '{nest}'" in read(path).layout


def test_nests_may_be_nested_and_averages_come_last_and_are_mentioned(tmp_path: Path) -> None:
    model, average = net(seed=1), net(seed=2)
    inner = {"state_dict": model.state_dict(), "ema": average.state_dict()}
    path = saved({"model": inner}, tmp_path / "net.pt")
    assert torch.equal(as_read(path)(X), model(X))
    assert read(path).notes == ("the file also holds 'ema'; the weights of 'state_dict' are used",)


def test_a_key_that_holds_settings_instead_of_weights_is_passed_over(tmp_path: Path) -> None:
    model = net()
    path = saved({"model": {"name": "cnn_small", "width": 1}, "net": model.state_dict()}, tmp_path / "net.pt")
    assert torch.equal(as_read(path)(X), model(X))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model.", "_orig_mod.module.", "model.module."])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str) -> None:
    model = net()
    path = saved({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "net.pt")
    assert torch.equal(as_read(path)(X), model(X))


def test_what_dataparallel_compile_and_averaging_save_is_read(tmp_path: Path) -> None:
    model = net()
    for wrap in (nn.DataParallel, torch.compile, AveragedModel):
        path = saved({"state_dict": wrap(model).state_dict()}, tmp_path / "net.pt")
        assert torch.equal(as_read(path)(X), model(X))


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    state = {("module." if "fc" in name else "") + name: value for name, value in net().state_dict().items()}
    assert "it lacks fc1.bias" in refused(saved(state, tmp_path / "net.pt"))


# ---- number types and sparse tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_without_loss(tmp_path: Path, dtype: torch.dtype) -> None:
    model = masked(net()).to(dtype)
    path = saved(model.state_dict(), tmp_path / "net.pt")
    assert torch.equal(as_read(path)(X), model.float()(X))
    assert read(path).notes == ()
    assert str(dtype).removeprefix("torch.") in read(path).layout


def test_double_precision_is_rounded_and_says_how_many_numbers_changed(tmp_path: Path) -> None:
    state = net().double().state_dict()
    assert read(saved(state, tmp_path / "same.pt")).notes == ()  # float32 values, so nothing is lost
    state["fc2.bias"] = torch.arange(1, 11).double() / 10
    (note,) = read(saved(state, tmp_path / "net.pt")).notes
    assert note.startswith("8 numbers were rounded")  # of 0.1 ... 1.0 only 0.5 and 1.0 are binary fractions


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda w: w.to_sparse(),
    "csr": lambda w: w.flatten(1).to_sparse_csr() if w.dim() == 2 else w.to_sparse(),
    "csc": lambda w: w.to_sparse_csc() if w.dim() == 2 else w.to_sparse(),
    "bsr": lambda w: w.to_sparse_bsr((2, 2)) if w.dim() == 2 else w.to_sparse(),
    "bsc": lambda w: w.to_sparse_bsc((2, 2)) if w.dim() == 2 else w.to_sparse(),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_tensors_are_the_same_network(tmp_path: Path, kind: str, zipped: bool) -> None:
    model = masked(net())
    state = {name: SPARSE[kind](value) if name.endswith("weight") else value for name, value in model.state_dict().items()}
    path = saved(state, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(as_read(path)(X), model(X))
    assert "sparse tensors" in read(path).layout


def test_sparse_entries_given_twice_are_added(tmp_path: Path) -> None:
    twice = torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0]), (2, 3))
    assert read(saved({"a": twice}, tmp_path / "net.pt")).state["a"].tolist() == [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]


def outside_coo() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 9], [1, 99]]), torch.ones(2), (4, 6), check_invariants=False)


def outside_csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor([0, 1, 2], [1, 999_999], [1.0, 2.0], (2, 6), check_invariants=False)


@pytest.mark.parametrize("make", [outside_coo, outside_csr])
def test_sparse_indices_outside_their_tensor_are_refused_before_they_are_used(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    assert "damaged" in refused(saved({"a": make()}, tmp_path / "net.pt"))


def many_indices() -> Tensor:
    at, values = torch.zeros(1, 1, dtype=torch.int64).expand(1, 10**10), torch.ones(1).expand(10**10)
    return torch.sparse_coo_tensor(at, values, (4,), check_invariants=False)


@pytest.mark.parametrize("make", [
    lambda: torch.zeros(1).expand(10**6, 10**6), lambda: torch.zeros(10**6, 10**6, layout=torch.sparse_coo), many_indices,
], ids=["view", "sparse", "indices"])  # fmt: skip
def test_a_small_file_of_a_huge_tensor_is_refused_untouched(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    assert "unpacks to more than" in refused(saved({"a": make()}, tmp_path / "net.pt"))


# ---- masks and scores ------------------------------------------------------------------------------------------------


def test_pairs_of_torch_prune_are_their_product(tmp_path: Path) -> None:
    model = net()
    for layer in prunable(model).values():
        prune.random_unstructured(layer, "weight", 0.7)
    prune.l1_unstructured(model.get_submodule("fc1"), "bias", 0.5)
    path = saved(model.state_dict(), tmp_path / "net.pt")
    assert "fc1.bias_orig" in model.state_dict()
    again = as_read(path)
    assert torch.equal(again(X), model(X))
    for name, layer in prunable(again).items():
        assert torch.equal(layer.weight == 0, model.get_submodule(name).weight == 0)
    assert "torch.nn.utils.prune masks" in read(path).layout


def test_masks_as_parametrizations_are_their_product(tmp_path: Path) -> None:
    model = net()
    mask_layers(model, keep_largest({n: torch.rand(w.shape) for n, w in weights(model).items()}, Fraction("0.1")))
    path = saved({"state_dict": nn.DataParallel(model).state_dict()}, tmp_path / "net.pt")
    assert torch.equal(as_read(path)(X), model(X))


def test_scores_as_parametrizations_need_the_density_that_they_were_trained_with(tmp_path: Path) -> None:
    model, density = net(), Fraction(1, 10)
    for layer in prunable(model).values():
        attach(layer, TopKScores(torch.randn(layer.weight.shape), kept_of(layer.weight.numel(), density)))
    path = saved(model.state_dict(), tmp_path / "net.pt")
    assert torch.equal(as_read(path, density)(X), model(X))
    assert "--density 0.1" in refused(path)


class HydraConv(nn.Conv2d):
    """HYDRA's masked layer, by its published algorithm: sort |scores|, drop the first (1-k) share."""

    def keep(self, k: float) -> Tensor:
        scores = self.popup_scores.abs()
        order = scores.flatten().sort()[1]
        mask = self.weight.new_ones(scores.numel())
        mask[order[: int((1 - k) * scores.numel())]] = 0
        return self.weight * mask.view_as(scores)


@pytest.mark.parametrize("k", [0.1, 0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hydra_scores_keep_what_the_published_algorithm_keeps(tmp_path: Path, k: float, dtype: torch.dtype) -> None:
    layer = HydraConv(3, 16, 4)
    layer.popup_scores = nn.Parameter(torch.randn(layer.weight.shape, dtype=dtype))
    state = {f"module.{name}": value for name, value in layer.state_dict().items()}
    path = saved({"state_dict": state, "epoch": 20}, tmp_path / "model_best.pth.tar")
    found = read(path, Fraction(str(k)))
    assert torch.equal(found.state["weight"], layer.keep(k))
    assert found.state.keys() == {"weight", "bias"}
    assert found.layout == f"torch file, nested under 'state_dict', prefix 'module.', HYDRA scores at density {Fraction(str(k))}"


def hydra_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as HYDRA's bare Sequential would have it, with scores."""
    scored = copy.deepcopy(nn.Sequential(*model.children()))
    for layer in prunable(scored).values():
        layer.popup_scores = nn.Parameter(torch.randn(layer.weight.shape))
    return scored.state_dict()


@pytest.mark.parametrize("arch", ["cnn_small", "cnn_large"])
def test_names_of_a_bare_sequential_are_matched_by_order_and_shape(tmp_path: Path, arch: str) -> None:
    model, card = net(arch), Card(arch, SHAPE, 10, "digits")
    path = saved(nn.Sequential(*model.children()).state_dict(), tmp_path / "net.pt")
    state = read(path).state
    assert "0.weight" in state
    assert read(path).layout == "torch file, names of a bare nn.Sequential"
    assert torch.equal(network(state, card, path)(X), model(X))
    assert guess_arch(state, SHAPE, 10) == arch
    assert classes_of(arch, state, SHAPE) == classes_of(arch, model.state_dict(), SHAPE) == 10
    shuffled = dict(reversed(list(state.items())))  # safetensors sorts names, so the order of the file says nothing
    assert torch.equal(network(shuffled, card, path)(X), model(X))


def test_a_bare_sequential_of_other_shapes_or_layers_is_refused(tmp_path: Path) -> None:
    state = nn.Sequential(*net().children()).state_dict()
    assert "it lacks" in refused(saved({**state, "9.weight": torch.zeros(3)}, tmp_path / "more.pt"))
    assert "it lacks" in refused(saved({**state, "0.weight": torch.zeros(16, 1, 3, 3)}, tmp_path / "shape.pt"))
    del state["5.bias"]
    assert "it lacks" in refused(saved(state, tmp_path / "less.pt"))
    assert classes_of("cnn_small", {}, SHAPE) is None


def test_a_whole_hydra_checkpoint_is_a_network_of_ours(tmp_path: Path) -> None:
    path, density = saved({"epoch": 1, "state_dict": hydra_state(net())}, tmp_path / "model_best.pth.tar"), Fraction(1, 20)
    again = as_read(path, density)
    for layer in prunable(again).values():
        assert int((layer.weight != 0).sum()) == kept_of(layer.weight.numel(), density)
    assert "does not hold its density" in refused(path)
    for odd in (Fraction(0), Fraction(-1, 2), Fraction(3, 2)):
        assert "--density must be above 0" in refused(path, odd)


def test_a_density_without_scores_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    assert "holds no scores" in refused(saved(net().state_dict(), tmp_path / "net.pt"), Fraction(1, 10))


def state_with(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**net().state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


W = torch.ones(10, 100)
ODD_PAIRS = {
    "no mask": (state_with(fc2__weight=None, fc2__weight_orig=W), "without fc2.weight_mask"),
    "both": (state_with(fc2__weight_orig=W, fc2__weight_mask=W), "both fc2.weight and fc2.weight_orig"),
    "mask shape": (state_with(fc2__weight=None, fc2__weight_orig=W, fc2__weight_mask=W[:, :1]), "the mask of fc2.weight has"),
    "mask values": (state_with(fc2__weight=None, fc2__weight_orig=W, fc2__weight_mask=W / 2), "other values than 0 and 1"),
    "mask alone": (state_with(fc2__weight_mask=W), "it also holds fc2.weight_mask"),
    "scores alone": (state_with(fc2__weight=None, fc2__popup_scores=W), "without fc2.weight"),
    "scores shape": (state_with(fc2__popup_scores=W[:5]), "fc2.popup_scores has shape (5, 100)"),
    "integer scores": (state_with(fc2__popup_scores=W.long()), "scores are floating point"),
    "unknown part": ({**state_with(fc2__weight=None), "fc2.parametrizations.weight.original": W,
                      "fc2.parametrizations.weight.0.base": W}, "parametrization"),
    "no part": ({**state_with(fc2__weight=None), "fc2.parametrizations.weight.original": W}, "parametrization"),
    "a gap": ({**state_with(fc2__weight=None), "fc2.parametrizations.weight.original": W,
               "fc2.parametrizations.weight.1.mask": W}, "parametrization"),
    "two originals": ({**state_with(fc2__weight=None), "fc2.parametrizations.weight.original0": W}, "it lacks fc2.weight"),
    "no original": ({**state_with(fc2__weight=None), "fc2.parametrizations.weight.0.mask": W}, "parametrization"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_PAIRS)
def test_masks_and_scores_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    state, complaint = ODD_PAIRS[name]
    assert complaint in refused(saved(state, tmp_path / "net.pt"), Fraction(1, 2) if "scores" in name else None)


def test_reparametrisations_of_torch_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    for wrap in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = net()
            wrap(model.get_submodule("fc1"))
            refused(saved(model.state_dict(), tmp_path / "net.pt"))


def test_several_masks_on_one_weight_are_all_applied(tmp_path: Path) -> None:
    model = net()
    layer = model.get_submodule("fc1")
    for seed in (0, 1):
        mask = (torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    assert torch.equal(as_read(saved(model.state_dict(), tmp_path / "net.pt"))(X), model(X))


# ---- hostile and damaged files ---------------------------------------------------------------------------------------


class Runs:
    """Pickled, it creates a folder wherever it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "optimizer", "args"])
def test_an_object_anywhere_in_a_nested_file_is_refused_and_never_runs(tmp_path: Path, key: str, zipped: bool) -> None:
    trace = tmp_path / "it ran"
    hostile = {"model": net().state_dict(), key: {"a": Runs(trace)}}
    path = saved(hostile, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    assert "nothing is ever unpickled" in refused(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the test's own harmless payload is live: unpickled on purpose, it runs
    assert trace.exists(), "the payload does nothing, so the test proves nothing"


@pytest.mark.parametrize("value", [
    {"state_dict": {}}, {"state_dict": {"state_dict": {"state_dict": {"state_dict": {"state_dict": {"a": W}}}}}},
    {"optimizer": {"a": W}}, {"state_dict": [W]}, {"state_dict": {"a": 1}}, {"a": {"b": W}}, {"state_dict": None}, [], 3, W,
    {1: W}, {"model.": W}, {"a\nb": W}, {"a" * 10_000: W}, {"": W}, {"a": torch.zeros(3, device="meta")},
    {"a": torch.zeros(3, dtype=torch.complex64)}, {"a": torch.tensor(float("nan"))}, {"a_orig": W, "a_mask": W, "a": W},
], ids=lambda value: str(value)[:30].split("\n")[0])  # fmt: skip
def test_whatever_else_a_file_may_hold_is_one_sentence(tmp_path: Path, value: Any) -> None:
    refused(saved(value, tmp_path / "net.pt"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_and_quantised_tensors_are_refused_as_special(tmp_path: Path) -> None:
    for value in (torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), torch.nested.nested_tensor([W, W[:2]])):
        assert "of a special kind" in refused(saved({"a": value}, tmp_path / "net.pt"))


def test_onnx_and_torchscript_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "net.ONNX").write_bytes(b"\x08\x07")
    assert "is an ONNX file" in refused(tmp_path / "net.ONNX")
    torch.jit.save(torch.jit.trace(net(), X), tmp_path / "net.pt")
    assert "TorchScript" in refused(tmp_path / "net.pt")


def whole_files(folder: Path) -> list[Path]:
    model = masked(build_model("mlp", (1, 2, 2), 3).eval())
    small = {name: value[:4, :4].clone() if value.dim() > 1 else value[:4].clone() for name, value in model.state_dict().items()}
    pair = {"module.a.weight_orig": torch.ones(3), "module.a.weight_mask": torch.tensor([0.0, 1.0, 1.0])}
    sparse = {"a": small["fc2.weight"].to_sparse(), "b": small["fc2.weight"].to_sparse_csr()}
    save_file(small, folder / "a.safetensors")
    return [
        folder / "a.safetensors",
        *(saved(v, folder / f"{i}{z}.pt", _use_new_zipfile_serialization=z)
          for i, v in enumerate((small, {"state_dict": pair}, sparse)) for z in (True, False)),
    ]  # fmt: skip


def damage(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(out)), draw.randrange(5)
        if kind == 0:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at] = draw.choice((0, 0xFF, 0x7F, 0x80))
        elif kind == 2:
            del out[at : at + draw.randint(1, 40)]
        elif kind == 3:
            out[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 20)))
        else:
            other = draw.randrange(len(out))
            out[at : at + 16] = out[other : other + 16]
        if not out:
            break
    return bytes(out)


def test_damaged_files_of_every_layout_end_in_a_state_or_in_one_sentence(tmp_path: Path) -> None:
    draw, sentences = random.Random(7), []
    for path in whole_files(tmp_path):
        data = path.read_bytes()
        read(path)
        for _ in range(120):
            path.write_bytes(damage(data, draw))
            try:
                state = read(path, draw.choice((None, Fraction(1, 2)))).state
            except UserError as sentence:
                sentences.append(str(sentence))
            else:
                assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())
    assert len(sentences) > 300
    assert not any("\n" in sentence for sentence in sentences)


def test_a_zip_with_hand_made_pickles_ends_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    hand_made = b"", b"\x80\x02}.", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x02(l0\n."
    for content in (pickle.dumps({"a": 1}), pickle.dumps(object()), *hand_made):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", b"3\n")
        refused(path)
