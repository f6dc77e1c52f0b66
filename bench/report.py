"""What `certify` found, for people: a picture of the curve and one page that needs nothing but itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from leaderboard.plot import COLOURS, DASHES, INK, MARKERS
from leaderboard.stats import interval

from .files import write_whole

VERDICTS = {
    "certified": "proven", "broken": "a counterexample was found", "open": "neither", "misclassified": "wrong already",
    "abstain": "the smoothed classifier gives no class", "timeout": "not settled in time", "error": "could not be asked",
}  # fmt: skip


def write_report(answer: dict[str, Any], folder: Path) -> None:
    """Writes report.html, self-contained, and where there is a curve its table curve.csv and picture curve.png, else neither."""
    for name in ("curve.csv", "curve.png"):
        (folder / name).unlink(missing_ok=True)  # of an earlier question
    if answer["curve"]:
        table = pd.DataFrame(answer["curve"])
        write_whole(folder / "curve.csv", lambda temporary: table.to_csv(temporary, index=False))
        write_whole(folder / "curve.png", partial(_png, answer))
    html = page(answer)
    write_whole(folder / "report.html", lambda temporary: temporary.write_text(html, encoding="utf-8"))


def page(answer: dict[str, Any]) -> str:
    """One HTML page about a certified checkpoint; it asks for nothing outside itself and is the same for the same answer."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("leaderboard"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html", "j2"]),
    )
    curve = _shown(answer)
    return environment.get_template("certificate.html.j2").render(
        answer=answer, shares=list(_shares(answer["summary"])), picture=svg(answer) if curve else "", curve=curve,
        passport=list(_passport(answer["passport"])), smoothed=any("sigma" in one for one in answer["verifiers"]),
    )


def _shares(summary: dict[str, Any]) -> Iterator[tuple[str, int, str, str]]:
    """(what, count, share in percent, its 95 % Wilson interval)."""
    counts = {"classified correctly": summary["clean"]}
    counts |= {f"survive {name}": count for name, count in summary["survived"].items()}
    counts |= {f"certified by {name}": count for name, count in summary["certified_by"].items()}
    counts |= {f"verdict {name} ({meaning})": summary[name] for name, meaning in VERDICTS.items() if summary[name]}
    for what, count in counts.items():
        low, high = interval(count, summary["n"])
        share = f"{100 * count / summary['n']:.1f}" if summary["n"] else "-"
        yield what, count, share, f"{100 * low:.1f} to {100 * high:.1f}"


def _passport(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "weights kept", _kept(found)
    for kind in ("conv", "linear"):
        if found[kind]["total"]:
            yield f"in {kind} layers", _kept(found[kind])
    reachable = found["reachable"]
    yield "weights that can move a logit", reachable.get("not_computed") or _kept(reachable)
    yield "size against 32 bits for every dense weight", _bits(found["bits"])
    if "stored" in found:
        yield "non-zeros of the stored form (factors, codes)", _kept(found["stored"])
        yield "size of the stored form", _bits(found["stored"]["bits"])
    yield "N:M patterns in every layer", ", ".join(found["patterns"]) or "none"
    if found["uncounted"]:
        yield "matrices that are not counted", ", ".join(found["uncounted"])


def _kept(share: dict[str, Any]) -> str:
    return f"{share['kept']:,} of {share['total']:,} ({100 * share['density']:.2f} %)"


def _bits(bits: dict[str, Any]) -> str:
    ratio = bits["ratio"]
    return f"{100 * ratio['paper']:.2f} % (non-zeros and code books), {100 * ratio['csr']:.2f} % (with positions)"


# ---- the curve -------------------------------------------------------------------------------------------------------


def _shown(answer: dict[str, Any], most: int = 40) -> list[dict[str, Any]]:
    """The curve's rows for a table: all that were asked for, and of a smoothing verifier's many radii evenly spread ones."""
    named = [point for point in answer["curve"] if point["exact"] is not None]
    others = [point for point in answer["curve"] if point["exact"] is None]
    return named + others[:: max(1, -(-len(others) // most))]


def svg(answer: dict[str, Any]) -> str:
    """The curve as one `<svg>` element for a page: text and axes take the page's colour."""
    style: dict[str, Any] = {"svg.hashsalt": "curve", "svg.fonttype": "none"}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _draw(answer, style, lambda figure: figure.savefig(out, format="svg", transparent=True, metadata=nothing))
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")  # the prologue names an address outside


def _png(answer: dict[str, Any], path: Path) -> None:
    _draw(answer, {}, lambda figure: figure.savefig(path, format="png", dpi=160, metadata={"Software": None}))


def _draw(answer: dict[str, Any], style: Any, save: Callable[[Any], None]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    plain: Any = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
             "font.family": "sans-serif", "figure.constrained_layout.use": True}  # fmt: skip
    with matplotlib.rc_context({**plain, **style}):
        figure = Figure(figsize=(6, 3.8))
        axis = figure.subplots()
        curve, summary = pd.DataFrame(answer["curve"]), answer["summary"]
        for place, ((kind, by), line) in enumerate(curve.groupby(["kind", "by"], sort=False)):
            _line(axis, line.sort_values("eps"), kind, "survives every attack" if kind == "attacked" else by, place)
        if summary["n"]:
            axis.axhline(100 * summary["clean"] / summary["n"], color="#808080", linewidth=1, dashes=(1, 2), label="clean")
        axis.set(ylim=(0, 102), xlabel=f"{answer['threat']['norm']} radius, pixels in [0,1]", ylabel="share of test images, %")
        axis.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        save(figure)


def _line(axis: Any, line: pd.DataFrame, kind: str, name: str, place: int) -> None:
    """Steps that hold between the points too: what is proven at a radius holds below it, what is broken stays broken above."""
    eps, share = [0.0, *line["eps"]], [*(100 * line["share"])]
    if kind == "certified":
        share, drawn = [share[0], *share], "steps-pre"
    else:
        eps, drawn = eps[1:], "steps-post"
    axis.plot(
        eps, share, drawstyle=drawn, label=name.lstrip("_") or "unnamed", color=COLOURS[place % len(COLOURS)],
        linestyle=DASHES[place % len(DASHES)], marker=MARKERS[place % len(MARKERS)] if len(line) <= 20 else "",
        markersize=5, markevery=slice(1 if kind == "certified" else 0, None), linewidth=1.4,
    )
