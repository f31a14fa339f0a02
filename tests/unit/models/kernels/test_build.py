"""Building and loading: the cache, its lock, what ptxas reports, what is said without nvcc."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from models.kernels import build, library
from tests.emulation import emulated

ROOT = Path(__file__).resolve().parents[4]
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_80'
ptxas info    : Function properties for _Z3fooPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3barPf' for 'sm_90a'
ptxas info    : Function properties for _Z3barPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_report_of_ptxas() -> None:
    foo, bar = build.parse_report(REPORT)
    assert foo == build.Kernel("_Z3fooPf", "80", 40, 8, 12, 16) and foo.spills
    assert bar == build.Kernel("_Z3barPf", "90a", 12, 0, 0, 0) and not bar.spills
    with pytest.raises(ValueError, match="no figures of kernel _Z3fooPf"):
        build.parse_report(REPORT.replace("bytes spill stores", "octets"))


@pytest.fixture(scope="module")
def built() -> tuple[Path, list[build.Kernel]]:
    """Everything for both architectures, as a wheel carries it; kept while the sources stay."""
    if build.find_nvcc() is None:
        pytest.skip("no nvcc here: the CUDA code is compiled where there is one")
    folder = ROOT / ".cache" / "kernels" / build.source_hash()
    path, report = folder / "libespalier.so", folder / "report.json"
    if not report.is_file():
        kernels = build.build(path)
        report.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))
    return path, [build.Kernel(**kernel) for kernel in json.loads(report.read_text())]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # whoever comes first compiles
def test_compiles_without_spills(built: tuple[Path, list[build.Kernel]]) -> None:
    _, kernels = built
    assert {kernel.architecture for kernel in kernels} == {"80", "90"}
    assert len(kernels) > 200
    assert [kernel for kernel in kernels if kernel.spills] == []
    wide = [k for k in kernels if "ffn_backward" in k.name]
    assert max(k.registers for k in wide) <= 64  # half of the threads a processor can hold


@pytest.mark.slow
@pytest.mark.timeout(1200)  # whoever comes first compiles
def test_loads_without_a_driver_and_knows_its_sources(
    built: tuple[Path, list[build.Kernel]],
) -> None:
    loaded = library.Library(built[0])
    assert loaded.source_hash == build.source_hash()
    needed = loaded.query("espalier_ffn_act_mask_backward_workspace", 100, 64)
    assert needed == emulated().query("espalier_ffn_act_mask_backward_workspace", 100, 64) > 0
    if torch.cuda.is_available():
        return
    with pytest.raises(RuntimeError, match="driver|device"):
        loaded.launch(
            "espalier_ffn_act_mask",
            *(torch.zeros(8), None, None, torch.zeros(8), 1, 8, 8, 0, 0, 0, 0, 0),
        )


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPALIER_NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(build.BuildError, match="ESPALIER_NVCC names"):
        build.find_nvcc()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildError, match="ESPALIER_KERNELS=reference"):
        build.cached()


def stand_in(folder: Path) -> Path:
    """A compiler that notes each call and writes what -o names."""
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo stand-in 1.0; exit 0; fi\n'
        f'echo call >> {folder}/calls\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n'
    )
    path.chmod(0o755)
    return path


def test_several_processes_build_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPALIER_NVCC", str(stand_in(tmp_path)))
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "models.kernels.build", "--arch", "90"]
    found: list[str] = []

    def run() -> None:
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    units = sum(path.suffix == ".cu" for path in build.sources())
    assert len((tmp_path / "calls").read_text().split()) == units + 1  # and one to link
    assert len(set(found)) == 1 and Path(found[0].strip()).read_text() == "made\n"
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".build-")]
    assert left == []


def test_cache_depends_on_sources_compiler_and_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = stand_in(tmp_path)
    monkeypatch.setenv("ESPALIER_NVCC", str(nvcc))
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    first = build.cached(["90"])
    assert build.cached(["90"]) == first
    others = {first, build.cached(["80"])}
    monkeypatch.setattr(build, "source_hash", lambda: "0" * 16)
    others.add(build.cached(["90"]))
    nvcc.write_text(nvcc.read_text().replace("1.0", "1.1"))
    others.add(build.cached(["90"]))
    assert len(others) == 4
    with pytest.raises(ValueError, match="sm_90"):
        build.cached(["sm_90"])


def test_a_failing_compiler_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho no such instruction >&2\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("ESPALIER_NVCC", str(nvcc))
    with pytest.raises(build.BuildError, match="code 3:\nno such instruction"):
        build.build(tmp_path / "out" / "libespalier.so")
    assert list((tmp_path / "out").iterdir()) == []


def test_launch_arguments() -> None:
    emulator = emulated()
    with pytest.raises(RuntimeError, match=r"unsupported element type \(code -1\)"):
        emulator.launch(
            "espalier_ffn_act_mask",
            *(torch.zeros(8), None, None, torch.zeros(8), 1, 8, 8, 7, 0, 0, 0, 0),
        )
    with pytest.raises(ValueError, match="one device"):
        emulator.launch("espalier_ffn_act_mask", torch.zeros(8), torch.zeros(8, device="meta"))
    with pytest.raises(TypeError, match="float64"):
        library.type_code(torch.float64)
    assert isinstance(library._convert(2.5), ctypes.c_double)


def test_the_emulation_notices_what_a_gpu_would() -> None:
    """Out of bounds and misaligned accesses; a test that cannot fail is a defect."""
    emulator, long, short = emulated(), torch.zeros(16), torch.zeros(8)
    for x, y in ((long, short), (short, long)):
        with pytest.raises(RuntimeError, match="outside every tensor"):
            emulator.launch("espalier_ffn_act_mask", x, None, None, y, 2, 8, 8, 0, 0, 0, 0, 0)
