"""What the CUDA kernels, and their twins on the host, take to lie where in Hopper's tiles, against CuTe's own layouts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cutlass() -> Path | None:
    """The folder of CUTLASS's headers: FASTRLHF_CUTLASS, or of the package nvidia-cutlass."""
    if given := os.environ.get("FASTRLHF_CUTLASS"):
        folder = Path(given)
        return folder / "include" if (folder / "include/cute").exists() else folder
    found = importlib.util.find_spec("cutlass_library")
    return Path(found.submodule_search_locations[0]) / "source/include" if found and found.submodule_search_locations else None


def toolkit() -> Path | None:
    """The folder of CUDA's headers. nvcc on the PATH may be a script elsewhere."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    folders = [Path(h) / "include" for h in homes if h]
    return next((f for f in folders if (f / "cccl").exists()), None)


@pytest.mark.cpu_only  # once is enough
def test_tiles_lie_as_cute_says(tmp_path: Path) -> None:
    headers, cuda = cutlass(), toolkit()
    if headers is None or cuda is None:
        pytest.skip("needs CUTLASS's headers and a CUDA toolkit's")
    program = tmp_path / "layouts"
    folders = [headers, cuda, cuda / "cccl", ROOT / "kernels"]
    compiler = os.environ.get("CXX", "g++")
    source = ROOT / "tests/cuda_host/layouts.cpp"
    subprocess.run([compiler, "-std=c++17", "-w", *(f"-I{f}" for f in folders), str(source), "-o", str(program)], check=True)
    out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    lines = [
        line for line in out.splitlines() if not line.startswith("ERROR: cast_smem_ptr_to_uint")
    ]  # CuTe's, where there is no device
    assert lines == ["fragment 0", "swizzle 0", "descriptor 0"]
