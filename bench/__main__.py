"""The command line: `sparsecert <verb>` and `python -m bench <verb>` are the same program."""

from __future__ import annotations

import sys

from .commands import (  # noqa: F401  (each adds its verbs)
    boards,
    certify,
    challenges,
    checking,
    claims,
    data,
    listing,
    plugins,
    releases,
    security,
    site,
    suites,
)
from .commands.options import app
from .errors import UserError

try:  # typer brings its own click since 0.26; before, it stood on the package
    from typer._click.exceptions import ClickException
except ImportError:
    from click.exceptions import ClickException  # type: ignore[no-redef, import-not-found]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every mistake of the user's is one sentence on stderr and exit code 2."""
    from leaderboard.errors import LeaderboardError

    try:
        code = app(args=arguments, standalone_mode=False)
        code = code if isinstance(code, int) else 0
        if code == 130:
            print("sparsecert: interrupted; run the same command again to go on", file=sys.stderr)
    except ClickException as mistake:
        words = mistake.format_message().replace("\n", " ")
        if words:
            print(f"sparsecert: {words}", file=sys.stderr)
        code = 2
    except (UserError, LeaderboardError) as mistake:
        print(f"sparsecert: {mistake}", file=sys.stderr)
        code = 2
    except OSError as reason:
        print(f"sparsecert: {reason}", file=sys.stderr)
        code = 2
    if arguments is None:
        sys.exit(code)
    return code


if __name__ == "__main__":
    main()
