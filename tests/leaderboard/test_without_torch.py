from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .conftest import Run

ROOT = Path(__file__).resolve().parents[2]

# A finder that refuses, not `sys.modules["torch"] = None`: scipy looks into sys.modules and trips over the None.
CHECK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "bench", "attacks", "verifiers"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
import leaderboard
assert not {"pandas", "pydantic", "statsmodels", "matplotlib", "numpy"} & set(sys.modules), "the bare import is not light"
import leaderboard.canonical, leaderboard.stats
assert "pydantic" not in sys.modules, "what trains must not need pydantic"
from rich.console import Console
from leaderboard.board import load, ranked
from leaderboard.checks import check_all
from pathlib import Path
from leaderboard.render import markdown, terminal
from leaderboard.site.sources import gather
from leaderboard.site.write import write_site
folder = sys.argv[1]
print(check_all(folder))
board = ranked(load(folder))
write_site(gather([Path(folder)]), Path(folder) / "site")
terminal(board, Console())
markdown(board)
assert "torch" not in sys.modules
"""


def test_records_are_checked_and_drawn_where_there_is_no_torch(run: Run) -> None:
    record = run.add()
    command = [sys.executable, "-c", CHECK, str(run.root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{{'{record.id}': []}}")
    assert "hydra" in done.stdout
    assert (run.root / "site" / "index.html").is_file()
