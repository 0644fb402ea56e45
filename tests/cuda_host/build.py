"""The CUDA sources as the host compiler builds them, with shim.h in CUDA's place."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "fastrlhf_cuda_host"


def sources() -> list[Path]:
    refit = [ROOT / "src/csrc/refit/bind_cuda.cpp", ROOT / "src/csrc/refit/cuda_copy.cu"]
    return [ROOT / "src/csrc/cuda_module.cpp", HERE / "shim.cpp", *refit, *sorted(ROOT.glob("kernels/*/cuda*.cu"))]


def _digest(flags: list[str]) -> str:
    files = [
        *ROOT.glob("kernels/**/*.h"),
        *ROOT.glob("kernels/**/*.cu*"),
        *ROOT.glob("src/csrc/*.*"),
        *ROOT.glob("src/csrc/refit/*"),
        *HERE.glob("shim.*"),
    ]
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def module() -> ModuleType:
    """Built when its sources have changed, and imported."""
    import pybind11

    flags = [
        "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-DFASTRLHF_CUDA_HOST",
        "-DFASTRLHF_ISA=gpu", f"-DFASTRLHF_CUDA_MODULE={NAME}", "-DFASTRLHF_CUDA_ARCH_LIST=0", "-DFASTRLHF_SM90",
        *(f"-I{d}" for d in (HERE, ROOT / "src", ROOT / "src/csrc", ROOT / "kernels", pybind11.get_include(), sysconfig.get_path("include"))),
        *os.environ.get("FASTRLHF_CUDA_HOST_FLAGS", "").split(),
    ]  # fmt: skip
    folder = Path(tempfile.gettempdir()) / f"fastrlhf-cuda-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    digest = _digest(flags)
    library = folder / f"{NAME}-{digest}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes: the first builds
        if not library.exists():
            _build(library, flags)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(library: Path, flags: list[str]) -> None:
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(dir=library.parent) as objects:
        built = []
        running = []
        for source in sources():
            to = Path(objects) / f"{source.parent.name}-{source.stem}.o"
            built.append(str(to))
            level = ["-O1"] if "csrc" in source.parts and source.suffix == ".cpp" else []  # bindings, as in CMakeLists.txt
            running.append(subprocess.Popen([compiler, *flags, *level, "-x", "c++", "-c", str(source), "-o", str(to)]))
            if len(running) == (os.cpu_count() or 1):
                _finish(running.pop(0))
        for process in running:
            _finish(process)
        linked = Path(objects) / "linked.so"
        subprocess.run([compiler, "-shared", *built, "-o", str(linked)], check=True)
        os.replace(linked, library)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise RuntimeError(f"{' '.join(map(str, process.args))} failed")  # type: ignore[arg-type]
