"""new and check-plugin: a first file for a plug-in, and whether it keeps the contracts of its kind."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import UserError, unknown
from .options import Json, app, show

if TYPE_CHECKING:
    from ..contracts import Finding

KINDS = ("method", "objective", "attack", "verifier")
NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
Kind = Annotated[Optional[str], typer.Option("--kind", help=f"{', '.join(KINDS)}; default: told from its __call__.")]  # noqa: UP045
USE = {
    "method": "sparsecert run digits@1 --method {plugin}",
    "objective": '[[objective]] with name = "{plugin}" in a suite of yours',
    "attack": "sparsecert certify CHECKPOINT --attack {plugin}",
    "verifier": "sparsecert certify CHECKPOINT --verifier {plugin}",
}


@app.command(epilog="Example: `sparsecert new method my_method`")
def new(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    name: Annotated[str, typer.Argument(help="The file's name without .py, such as my_method.")],
) -> None:
    """Write NAME.py, a small plug-in that runs as it is, and test_NAME.py, which holds it against the contracts of its kind."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    paths = Path(f"{name}.py"), Path(f"test_{name}.py")
    _check(name, paths)
    plugin = f"{paths[0]}:{_class(name)}"
    for path, template in zip(paths, (kind, "test")):
        with path.open("x", encoding="utf-8") as file:
            file.write(_rendered(template, kind=kind, name=name, cls=_class(name)))
    print(f"wrote {paths[0]} (the {kind} {_class(name)}) and {paths[1]}; change what it does, then:")
    print(f"  check it   sparsecert check-plugin {plugin}")
    print(f"  use it     {USE[kind].format(plugin=plugin)}")


def _check(name: str, paths: Sequence[Path]) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        nearest = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", Path(name).stem), flags=re.ASCII).strip("_").lower()
        hint = f"; try {nearest}" if NAME.fullmatch(nearest) and not keyword.iskeyword(nearest) else ""
        raise UserError(f"{name!r} is no name for a Python file: small letters, digits and _, a letter first{hint}")
    for path in paths:
        if path.exists():
            raise UserError(f"{path} is there already and is left as it is; choose another name")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"{name}.py would hide the Python module {name!r}; try my_{name}")


def _class(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _rendered(template: str, **words: str) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("bench"), undefined=StrictUndefined, keep_trailing_newline=True)  # no HTML
    return environment.get_template(f"{template}.py.j2").render(words)


@app.command("check-plugin", epilog="Example: `sparsecert check-plugin my_method.py:MyMethod`")
def check_plugin(
    plugin: Annotated[str, typer.Argument(help="file.py:Class, module:Class or a name.")],
    kind: Kind = None,
    as_json: Json = False,
) -> None:
    """Hold a method, objective, attack or verifier against the contracts of its kind; exit code 3 if one does not hold."""
    import torch

    from ..contracts import findings, kind_of

    torch.set_num_threads(1)
    kind = kind or kind_of(plugin)
    found = list(findings(kind, plugin))
    if as_json:
        show({"plugin": plugin, "kind": kind, "holds": not any(one.why for one in found), "findings": list(map(vars, found))})
    else:
        print_findings(f"{plugin}, {_a(kind)}", found)
    if any(one.why for one in found):
        raise typer.Exit(3)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "ao" else f"a {kind}"


def print_findings(title: str, found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("contract", "holds", "fails", "refused"):
        table.add_column(name, justify="left" if name == "contract" else "right")
    for contract in dict.fromkeys(one.contract for one in found):
        own = [one for one in found if one.contract == contract]
        counts = (sum(one.holds for one in own), sum(bool(one.why) for one in own), sum(bool(one.refused) for one in own))
        table.add_row(contract, *(str(count or "") for count in counts))
    Console().print(table)
    for one in found:
        if one.why:
            print(f"fails: {one.contract} ({one.case}): it {one.why}")
    for words in dict.fromkeys(one.refused for one in found if one.refused):
        print(f"refused: {words}")
    print("it does not keep its contracts" if any(one.why for one in found) else "it keeps every contract that was tried")
