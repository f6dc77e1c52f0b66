"""One contract for all attacks, and each trap of torchattacks shown to be closed."""

from __future__ import annotations

import functools
import inspect
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks import ATTACKS, PGD, Library, TooFewClassesError, attack_class, attack_fields, library, lp, names

EPS = Fraction(1, 10)


def small_net(classes: int = 5) -> nn.Module:
    """Convolution, Dropout and BatchNorm with statistics of its own, on 1x6x6 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, classes)
        )
        model(torch.rand(32, 1, 6, 6))
        model.eval()
        model[5].bias.data -= model(images()).mean(dim=0)  # near the boundaries, so that weak attacks succeed too
    return model


def images(n: int = 6) -> Tensor:
    return 0.2 + 0.6 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (predicted(model, x) == y).double().mean().item()


QUICK: dict[str, dict[str, object]] = {
    "apgd": {"steps": 10},
    "apgdt": {"steps": 10},
    "autoattack": {"steps": 5, "queries": 20},
    "ddn": {"steps": 20},
    "fmn": {"steps": 20},
    "wrm": {"gamma": 40.0},
    "fab": {"steps": 10},
    "square": {"n_queries": 20},
    "deepfool": {"steps": 5},
    "cw": {"steps": 10},
}
OWN = [*((name, norm) for name in ("pgd", "fgsm", "wrm", "fmn") for norm in lp.NORMS), ("ddn", "l2")]
LINF = ["bim", "tpgd", "mifgsm", "eotpgd", "upgd", "nifgsm", "rfgsm", "ffgsm", "spsa"]
BOTH = ["apgd", "apgdt", "fab", "square", "autoattack"]
L2 = ["pgdl2", "cw", "deepfool"]
GRID = [("pixle", "l0"), *OWN, *((n, "linf") for n in LINF + BOTH), *((n, "l2") for n in BOTH + L2)]


def make(name: str, norm: str, **fields: Any) -> Any:
    return attack_class(name)(**attack_fields(name, {"norm": norm, "eps": EPS, **QUICK.get(name, {}), **fields}))


@pytest.mark.parametrize("name, norm", [*GRID, ("library pgd", "linf"), ("library fgsm", "linf")])
def test_every_attack_keeps_its_contract_and_leaves_everything_as_it_was(name: str, norm: str, capsys: Any) -> None:
    theirs = name.removeprefix("library ")
    attack = make(name, norm) if theirs == name else Library(norm=norm, eps=EPS, attack=theirs)
    model, x = small_net(), images()
    y = predicted(model, x)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    model[5].bias.requires_grad_(False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state, numpy_state, kept = torch.get_rng_state(), np.random.get_state()[1].copy(), x.clone()  # noqa: NPY002

    with torch.no_grad():
        x_adv = attack(model, x, y)
    assert (x_adv.requires_grad, x_adv.shape, x_adv.dtype) == (False, x.shape, torch.float32)
    assert accuracy(model, x_adv, y) < 1
    assert x_adv.isfinite().all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if theirs not in ("cw", "deepfool", "pixle"):
        assert (lp.distance(x_adv, x, norm) <= float(EPS) + 1e-6).all()
    assert torch.equal(x, kept)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True, True, True]
    assert model[0].weight.grad.eq(3).all()
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert capsys.readouterr().out == ""

    torch.rand(1), np.random.rand(1)  # noqa: NPY002
    again = attack(model, x, y)
    assert torch.equal(again, x_adv), "same seed, same answer"
    assert not again.requires_grad


SHORT = {"steps": 2, "n_queries": 10, "max_iterations": 10, "popsize": 2}


@pytest.mark.parametrize("name, norm", [(name, norm) for name, norms in sorted(library.NORMS.items()) for norm in norms])
def test_every_name_of_the_library_answers_on_colour_images_with_images_in_the_unit_interval(name: str, norm: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5)).eval()
        x = torch.rand(3, 3, 16, 16)
    takes = inspect.signature(library._attack_type(torchattacks, name)).parameters
    quick = {key: value for key, value in SHORT.items() if key in takes}
    x_adv = Library(norm=norm, eps=EPS, attack=name, params=library.frozen(quick))(model, x, predicted(model, x))
    assert x_adv.shape == x.shape
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


def test_what_a_library_attack_costs_follows_from_its_steps() -> None:
    costs = {name: Library(eps=EPS, attack=name).cost for name in ("vanila", "fgsm", "ffgsm", "pgd", "apgd", "apgdt", "square")}
    assert costs == {"vanila": 1, "fgsm": 3, "ffgsm": 3, "pgd": 30, "apgd": 300, "apgdt": 2700, "square": 5000}
    assert Library(eps=EPS, attack="pgd", params=(("steps", 3),)).cost == 9


@pytest.mark.parametrize("name", ["fab", "deepfool", "pgd"])
def test_training_flags_of_each_submodule_come_back_and_the_attack_runs_in_eval_mode(name: str) -> None:
    model, x = small_net(), images()
    y = predicted(model, x)
    attack = Library(norm="l2" if name == "deepfool" else "linf", eps=EPS, attack=name)
    expected = attack(model, x, y)
    model.train()
    model[1].eval()  # torchattacks' own restore would unfreeze it
    flags = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    assert torch.equal(attack(model, x, y), expected)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("name, norm", [("autoattack", "linf"), ("sparsefool", "l0"), ("square", "linf")])
def test_the_model_never_runs_in_training_mode_during_an_attack(name: str, norm: str) -> None:
    """Bundles call attacks, and each of these restores the mode it believes was there."""
    model, x, modes = small_net(), images(), []
    y = predicted(model, x)
    model.register_forward_hook(lambda *_: modes.append([module.training for module in model.modules()]))
    make(name, norm)(model.train(), x, y)
    assert len(modes) > 2
    assert not any(any(flags) for flags in modes)


def test_everything_comes_back_after_an_exception() -> None:
    class Breaks(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 3:
                raise FloatingPointError("gone")
            logits: Tensor = self.net(x)
            return logits

    model, x = Breaks().train(), images()
    y = predicted(model.net.eval(), x)
    model.train()
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="gone"):
        Library(eps=EPS, attack="apgd")(model, x, y)
    assert [module.training for module in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Shifted(nn.Module):
    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x) + self.shift
        return logits


@pytest.mark.parametrize("attack", ["cw", "eaden"])
def test_logits_below_zero_do_not_hide_from_cw_and_ead(digits: Any, attack: str) -> None:
    x, y = digits.x[:40].clamp(0.05, 0.95), digits.y[:40]
    params = {"steps": 40, "lr": 0.05} if attack == "cw" else {"binary_search_steps": 4, "initial_const": 1.0}
    mended = Library(norm="l2", eps=EPS, attack=attack, params=params)  # type: ignore[arg-type]
    plain, low = digits.model, Shifted(digits.model, -50.0)
    broken = 1 - accuracy(plain, mended(plain, x, y), y)
    assert broken > 0.8
    assert 1 - accuracy(low, mended(low, x, y), y) == pytest.approx(broken, abs=0.08)
    if attack == "cw":  # the trap itself, so that this test is known to bite
        assert torch.equal(torchattacks.CW(low, steps=40, lr=0.05)(x, y), x)


def test_cw_moves_images_whose_pixels_are_all_black_or_white(digits: Any) -> None:
    x = digits.x[:30].round()
    y = predicted(digits.model, x)
    params = (("c", 10), ("lr", 0.1), ("steps", 100))
    x_adv = Library(norm="l2", eps=EPS, attack="cw", params=params)(digits.model, x, y)
    assert accuracy(digits.model, x_adv, y) < 0.5
    assert torch.equal(torchattacks.CW(digits.model, **dict(params))(x, y), x)


def test_an_image_that_cw_cannot_break_comes_back_as_it_was(digits: Any) -> None:
    x = digits.x[:5].round()
    assert torch.equal(
        Library(norm="l2", eps=EPS, attack="cw", params=(("c", 0),))(digits.model, x, predicted(digits.model, x)), x
    )


def test_pixels_that_are_not_finite_are_never_handed_out() -> None:
    """DeepFool divides by the gradient's norm; the logits of this network are constant."""
    model, x = small_net(), images()
    nn.init.zeros_(model[5].weight)
    y = predicted(model, x)
    assert torchattacks.DeepFool(model)(x, y).isnan().any()
    assert torch.equal(Library(norm="l2", eps=EPS, attack="deepfool")(model, x, y), x)


@pytest.mark.parametrize("name", ["mifgsm", "nifgsm", "bim", "pgd", "vmifgsm"])
def test_the_default_step_follows_eps(name: str) -> None:
    """At eps 3/10 the library's fixed 2/255 would reach less than a third of the ball in 10 steps."""
    model, eps = small_net(), Fraction(3, 10)
    x = 0.5 + 0.0 * images()
    x_adv = Library(eps=eps, attack=name)(model, x, predicted(model, x))
    torch.testing.assert_close(lp.distance(x_adv, x, "linf"), torch.full((6,), 0.3).double(), atol=1e-6, rtol=0)


def test_params_and_fields_reach_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    original = torchattacks.APGDT.__init__

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, **fields: Any) -> None:
        built.append(fields)
        original(self, *args, **fields)

    monkeypatch.setattr(torchattacks.APGDT, "__init__", recorded)
    model, x = small_net(classes=6), images()
    Library(norm="l2", eps=EPS, attack="apgdt", seed=9)(model, x, predicted(model, x))
    Library(eps=EPS, attack="apgdt", params=(("rho", "1/2"), ("steps", 3)))(model, x, predicted(model, x))
    Library(eps=EPS, attack="apgdt", params=(("targets", 2), ("steps", 3)))(model, x, predicted(model, x))
    assert built[0] == {"norm": "L2", "eps": 0.1, "seed": 9, "n_classes": 6, "steps": 100}
    assert built[2] == {"norm": "Linf", "eps": 0.1, "seed": 0, "n_classes": 3, "steps": 3}, "the two nearest classes"
    assert built[1] == {"norm": "Linf", "eps": 0.1, "seed": 0, "n_classes": 6, "steps": 3, "rho": 0.5}


@pytest.mark.parametrize("name, norm", [
    ("apgd", "linf"), ("apgd", "l2"), ("apgdt", "linf"), ("apgdt", "l2"), ("fab", "l2"), ("square", "linf"), ("square", "l2"),
    ("pgd", "linf"), ("pgdl2", "l2"), ("rfgsm", "linf"), ("eotpgd", "linf"),
    pytest.param("autoattack", "l2", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_an_image_gets_does_not_depend_on_its_neighbours(digits: Any, name: str, norm: str) -> None:
    """torchattacks draws noise for the whole batch, and APGDT steps an l2 batch by its first image's step size."""
    x, y = digits.x[:3], predicted(digits.model, digits.x[:3])
    params = {**QUICK.get(name, {}), **({"steps": 20, "targets": 1} if name == "apgdt" else {})}
    if name == "autoattack":
        attack = attack_class(name)(norm=norm, eps=Fraction(1, 2), **params)
    else:
        attack = Library(norm=norm, eps=Fraction(1, 8 if norm == "linf" else 2), attack=name, params=library.frozen(params))
    together = attack(digits.model, x, y)
    assert not torch.equal(together, x)
    for rows in ([2], [1, 0]):
        torch.testing.assert_close(attack(digits.model, x[rows], y[rows]), together[rows], atol=1e-5, rtol=0)


def test_another_seed_gives_another_start() -> None:
    model, x = small_net(), images()
    y = predicted(model, x)
    for name in ("pgd", "square"):
        first, second = (Library(eps=EPS, attack=name, params=QUICK.get(name, {}), seed=s) for s in (0, 1))  # type: ignore[arg-type]
        assert not torch.equal(first(model, x, y), second(model, x, y))


def test_a_model_without_parameters_and_a_model_that_returns_a_view_are_attacked_correctly(capsys: Any) -> None:
    """Square writes -inf into the logits; with a bare Flatten these are the pixels themselves."""
    x = images()
    for name in ("square", "pgd", "apgd"):
        attack = Library(eps=EPS, attack=name, params=(("n_queries", 300),) if name == "square" else ())
        y = x.flatten(1).argmax(dim=1)
        x_adv = attack(nn.Flatten(), x, y)
        assert accuracy(nn.Flatten(), x_adv, y) < 0.5
        assert capsys.readouterr().out == ""
        assert x_adv.isfinite().all()
        assert (lp.distance(x_adv, x, "linf") <= 0.1 + 1e-6).all()
        copied = attack(nn.Sequential(nn.Flatten(), nn.Hardtanh(-9, 9)), x, y)  # the same logits, in memory of their own
        assert torch.equal(x_adv, copied)


@pytest.mark.parametrize("name, params, classes, needed", [("apgdt", (), 3, 4), ("apgd", (("loss", "dlr"),), 2, 3)])
def test_too_few_classes_for_the_dlr_loss_are_refused_by_name(name: str, params: Any, classes: int, needed: int) -> None:
    with pytest.raises(TooFewClassesError, match=f"'{name}' needs {needed} classes .* has {classes}: use apgd"):
        Library(eps=EPS, attack=name, params=params)(small_net(classes), images(), torch.zeros(6, dtype=torch.long))
    model, x = small_net(classes), images()
    y = predicted(model, x)
    for loss in ("ce", "margin"):
        x_adv = Library(eps=EPS, attack="apgd", params=(("loss", loss), ("steps", 20)))(model, x, y)
        assert accuracy(model, x_adv, y) < 1, loss


def test_every_torchattacks_class_is_known_and_files_itself_under_the_norm_listed_here() -> None:
    wrappers = {"multiattack", "lgv"}
    assert set(library.NORMS) == {name.lower() for name in torchattacks.__all__} - wrappers - {"autoattack"}
    assert "autoattack" in names(), "ours"
    for name in torchattacks.__all__:
        stated = (getattr(torchattacks, name).__doc__ or "").split("Distance Measure :")
        if name.lower() in wrappers | {"vanila", "gn", "autoattack"} or len(stated) == 1:
            continue
        for norm in library.NORMS[name.lower()]:
            assert norm in stated[1].splitlines()[0].lower(), name


def documented(name: str) -> str:
    """Norms and parameters of an attack as docs/attacks.md shows them."""
    takes = inspect.signature(library._attack_type(torchattacks, name)).parameters
    params = {key: one.default for key, one in takes.items() if key not in {*library._OWN_FIELDS, "verbose"}}
    params |= ({"targets": 9} if "n_classes" in takes else {}) | library.STRENGTH.get(name, {})
    if "alpha" in takes and "eps" in takes:
        params["alpha"] = f"{takes['alpha'].default / takes['eps'].default:.3g} eps"
    words = ", ".join(f"{key} {round(one, 4) if isinstance(one, float) else one}" for key, one in params.items())
    return f"{', '.join(library.NORMS[name])} | {words}"


def test_the_page_names_every_attack_with_its_norms_and_parameters() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "attacks.md"
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    shown = {row[0].strip(" `"): f"{row[1].strip()} | {row[3].strip()}" for row in lines if len(row) == 4}
    assert {name: shown.get(name) for name in library.NORMS} == {name: documented(name) for name in library.NORMS}
    assert set(names()) - {"torchattacks"} <= set(shown)


def test_names_cover_both_catalogues_and_resolve() -> None:
    assert set(names()) == {*ATTACKS, *library.NORMS}
    assert attack_class("pgd") is PGD
    assert attack_class("apgd") is Library
    assert attack_fields("pgd", {"eps": EPS, "steps": 3}) == {"eps": EPS, "steps": 3}
    fields = attack_fields("pixle", {"norm": "l0", "eps": EPS, "restarts": 2, "x_dimensions": [2, 3]})
    long_form = {"norm": "l0", "eps": EPS, "attack": "pixle", "params": {"restarts": 2}, "x_dimensions": [2, 3]}
    assert attack_fields("torchattacks", long_form) == fields
    attack = Library(**fields)  # type: ignore[arg-type]
    assert attack.params == (("restarts", 2), ("x_dimensions", (2, 3)))
    assert hash(attack) == hash(Library(**fields))  # type: ignore[arg-type]
    assert repr(Library(eps=EPS, attack="apgd")) == (
        "Library(norm='linf', eps=Fraction(1, 10), attack='apgd', params=(('steps', 100),), seed=0)"
    )


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(KeyError, match="unknown attack 'apdg': did you mean 'apgd'"):
        attack_class("apdg")
    with pytest.raises(KeyError, match=r"no 'sqare': did you mean 'square'.*known names are apgd, apgdt"):
        Library(eps=EPS, attack="sqare")
    with pytest.raises(ValueError, match="'cw' works in l2, not in 'linf'"):
        Library(norm="linf", eps=EPS, attack="cw")
    with pytest.raises(ValueError, match="'fab' has no parameter 'step': it takes alpha_max"):
        Library(eps=EPS, attack="fab", params=(("step", 3),))
    with pytest.raises(ValueError, match="'apgd' has no parameter 'eps'"):
        Library(eps=EPS, attack="apgd", params=(("eps", 0.3),))
    with pytest.raises(KeyError, match="own autoattack runs 10 steps: ask for the standard bundle by the name autoattack"):
        Library(eps=EPS, attack="autoattack")
    with pytest.raises(TypeError, match=r"0\.1"):
        Library(eps=0.1, attack="apgd")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params must be a mapping"):
        Library(eps=EPS, attack="apgd", params="steps=3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params must be a mapping"):
        Library(norm="l2", eps=EPS, attack="cw", params=("lr",))  # type: ignore[arg-type]


def test_an_empty_batch_is_answered_with_an_empty_batch() -> None:
    assert Library(eps=EPS, attack="square")(small_net(), images()[:0], torch.zeros(0).long()).shape == (0, 1, 6, 6)
