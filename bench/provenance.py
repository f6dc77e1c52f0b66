"""Where a number comes from: code, packages, device."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OWN = ("attacks", "bench", "verifiers")
PACKAGES = (
    "torch", "numpy", "scipy", "auto-LiRPA", "torchattacks", "scikit-learn", "safetensors", "pandas", "statsmodels",
    "torchvision", "onnx", "onnx2torch",
)


def file_digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def code_digest() -> str:
    """sha256 over the sources that results depend on: an edited line makes every stored phase and record stale."""
    total = hashlib.sha256()
    for package in OWN:
        for path in sorted(path for end in ("*.py", "*.cpp") for path in (ROOT / package).rglob(end)):
            if path.name != "__main__.py" and path.parent.name != "commands" and "screen" not in path.stem:
                total.update(f"{path.relative_to(ROOT)}:{file_digest(path)}\n".encode())
    return total.hexdigest()


def source_digest(thing: Any) -> str | None:
    """sha256 of the file that defines a plug-in's class; None for what ships with the package (see code_digest)."""
    kind = thing if isinstance(thing, type) else type(thing)
    if kind.__module__.split(".")[0] in OWN:
        return None
    try:
        return file_digest(inspect.getfile(kind))
    except (TypeError, OSError):
        return None


def identity(thing: Any) -> str:
    """A plug-in's repr, and its source's digest where it comes from outside."""
    source = source_digest(thing)
    return repr(thing) if source is None else f"{thing!r} from {source}"


def version() -> str:
    try:
        return metadata.version("sparsecert")
    except metadata.PackageNotFoundError:
        return "0.1.0"


@functools.cache
def revision() -> tuple[str | None, bool | None]:
    """(git commit, whether the tree has uncommitted changes or unknown sources), or (None, None) outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # of any depth, and ignored ones, too
        unknown = [f"{package}/*.{end}" for package in (*OWN, "leaderboard") for end in ("py", "cpp")]
        dirty = git("status", "--porcelain", "--untracked-files=no") or git("ls-files", "--others", "--", *unknown)
        return git("rev-parse", "HEAD"), bool(dirty)
    except (OSError, subprocess.SubprocessError):
        return None, None


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()})"


def machine() -> dict[str, Any]:
    """The kind of machine, so that two kinds can be told apart; never its name or an id, which are nobody's business."""
    return {"processor": processor(), "cores": os.cpu_count() or 1, "memory_gib": memory_gib()}


def processor() -> str:
    """The processor's model, such as "AMD EPYC 7763 64-Core Processor"; its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*named, platform.processor(), platform.machine()]), "unknown")


def memory_gib() -> int:
    return max(1, round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30))


def provenance(device: torch.device, data: str) -> dict[str, Any]:
    """The record's provenance block."""
    commit, dirty = revision()
    return {
        "version": version(),
        "code": code_digest(),
        "revision": commit,
        "dirty": dirty,
        "packages": packages(),
        "python": platform.python_version(),
        "device": device_name(device),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "data": data,
    }
