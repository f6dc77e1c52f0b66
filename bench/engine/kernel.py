"""The C++ kernel, compiled once by the system's compiler for this processor and kept in the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..published import cache_folder

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
VARIANTS = {"avx512": ("-mavx512f", "-mfma"), "avx2": ("-mavx2", "-mfma"), "portable": ()}
PATIENCE = 300  # seconds for a compilation, which takes some five


class NoKernelError(Exception):
    """There is no kernel on this machine; the message says why."""


def variant_here() -> str:
    """The widest instruction set that this processor has; torch finds it out (ATEN_CPU_CAPABILITY lowers both)."""
    found = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "portable"
    return "avx512" if found.startswith("AVX512") else "avx2" if found.startswith("AVX2") else "portable"


@functools.cache
def load(variant: str) -> Any:
    """The kernel's library. Raises NoKernelError where it cannot be compiled or loaded."""
    name = _file_name(variant)
    try:
        folder = _private(cache_folder() / "engine")
        if not (folder / name).exists():
            _compile_into(folder, name, variant)
        return _declared(ctypes.CDLL(str(folder / name)))
    except OSError as reason:
        return _from_nowhere(name, variant, reason)


def _from_nowhere(name: str, variant: str, reason: OSError) -> Any:
    """A kernel of this process alone, where nothing can be kept (or what was kept cannot be loaded)."""
    try:
        with tempfile.TemporaryDirectory(prefix="sparsecert-") as folder:
            _compile_into(Path(folder), name, variant)
            return _declared(ctypes.CDLL(str(Path(folder) / name)))
    except OSError as second:
        raise NoKernelError(f"no kernel can be kept ({reason}) or made for this process alone ({second})") from second


def _private(folder: Path) -> Path:
    """The folder, made if need be. Raises OSError where somebody else could put a library into it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others")
    return folder


def _file_name(variant: str) -> str:
    parts = (SOURCE.read_bytes(), " ".join(_flags(variant)).encode(), platform.machine().encode(), platform.system().encode())
    return f"kernel-{variant}-{hashlib.sha256(b'/'.join(parts)).hexdigest()[:16]}.so"


def _flags(variant: str) -> tuple[str, ...]:
    return (*FLAGS, *VARIANTS[variant])


def _compile_into(folder: Path, name: str, variant: str) -> None:
    """Several processes may do this at once: the file appears whole."""
    handle, partial = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        compile_kernel(Path(partial), variant)
        os.replace(partial, folder / name)
    finally:
        Path(partial).unlink(missing_ok=True)


def compile_kernel(target: Path, variant: str, more: Sequence[str] = ()) -> None:
    """Compile the kernel into `target`, with `more` flags. Raises NoKernelError with the compiler's first error."""
    command = [*compiler(), *_flags(variant), *more, str(SOURCE), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise NoKernelError(f"the compiler {command[0]} did not run: {reason}") from reason
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise NoKernelError(f"the compiler {command[0]} failed: {errors[0]}")


def compiler() -> list[str]:
    """CXX, or the first C++ compiler on the path. Raises NoKernelError where there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = chosen if chosen and shutil.which(chosen[0]) else [name for name in COMPILERS if shutil.which(name)][:1]
    if not found:
        raise NoKernelError(f"no C++ compiler found ({', '.join(COMPILERS)}, or CXX)")
    return found


def _declared(library: Any) -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.engine_run.argtypes = [pointer, size, pointer, size, pointer, size, size, pointer, size]
    library.engine_run.restype = None
    library.engine_step_size.argtypes = []
    library.engine_step_size.restype = size
    return library
