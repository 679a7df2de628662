"""What every benchmark hands over: a header that says where and what was measured, a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import bitshard
from bitshard.bench.timing import Times
from bitshard.errors import BenchError, CheckpointError
from bitshard.versions import installed

REPOSITORY = Path(__file__).parents[3]
# packages of what benchmarks compare with
PEERS = ("transformers", "vllm", "llama-cpp-python", "bitsandbytes", "gemlite", "humming-kernels", "triton")


def header(device: str) -> dict[str, Any]:
    """Machine, versions, commit (null outside a source tree), date and load, as they are now."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "bitshard": bitshard.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "packages": {name: version for name in PEERS if (version := installed(name))},
        **(_gpus() if device == "cuda" else {"gpus": []}),
        "load": load(),
    }


def _gpus() -> dict[str, Any]:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False) if shutil.which(asked[0]) else None
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": found.stdout.partition("\n")[0].strip() if found else None,
        "cuda": torch.version.cuda,
    }


def require_timed(refused: Mapping[str, str], bench: str, found: str, allowed: str) -> None:
    """Raises BenchError where something was refused: its name and why."""
    if refused:
        every = "; ".join(f"{name}: {why}" for name, why in refused.items())
        fix = "mend them, or compare the others: they were timed"
        raise BenchError(bench, f"{len(refused)} {found}: {every}", allowed, fix)


def load() -> float:
    """Processes that ran or waited to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def _commit() -> str | None:
    """The commit, and `-dirty` where anything but results, which a run itself writes, differs from it."""
    if not (REPOSITORY / ".git").exists():
        return None
    asked = [["rev-parse", "--short", "HEAD"], ["diff", "--quiet", "HEAD", "--", ":!benchmarks/results"]]
    commit, changed = (
        subprocess.run(["git", "-C", str(REPOSITORY), *args], capture_output=True, text=True, check=False)
        for args in asked
    )
    return None if commit.returncode else commit.stdout.strip() + "-dirty" * (changed.returncode == 1)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor()
    # a virtual machine's name may be no more than "AMD EPYC"
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def caption(header: Mapping[str, Any]) -> str:
    """The header in one line, for below a table or a picture."""
    hardware = ", ".join(header["gpus"]) or f"{header['cpu']}, {header['cores']} cores"
    versions = f"bitshard {header['bitshard']} ({header['commit']}), torch {header['torch']}"
    return f"{header['date']}; {hardware}; {versions}; load {header['load']} before"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    """A narrow rich table; the first column is text, the others are numbers."""
    out = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def require_json_path(path: Path) -> None:
    """Make the folder of a result, before anything is measured. Raises CheckpointError."""
    if path.suffix != ".json":
        raise CheckpointError(str(path), f"suffix {path.suffix!r}", ".json", "the picture goes beside it as .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(str(path), str(error), "a folder that can be written", "choose another path") from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """All of it or, with CheckpointError, what was there before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            str(path), error.strerror or str(error), "a file that can be written", "choose another path"
        ) from None


@dataclass(frozen=True)
class Panel:
    """One small plot of milliseconds: for each line, its points (x, times)."""

    title: str
    lines: Mapping[str, list[tuple[float, Times]]]


def plot(path: Path, title: str, panels: Sequence[Sequence[Panel]], x_label: str, caption: str) -> None:
    """A grid of panels as a PNG: medians as lines, 10th to 90th percentile as bands, x logarithmic, y from 0."""
    from matplotlib.figure import Figure  # here, so that ranks which only measure start without it

    height, width = len(panels), max(map(len, panels))
    figure = Figure(figsize=(3.4 * width + 1, 2.4 * height + 1.2), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for axes_row, panel_row in zip(axes, panels, strict=True):
        for axis, panel in zip(axes_row, panel_row, strict=True):
            for label, points in panel.lines.items():
                x = [point[0] for point in points]
                axis.plot(x, [times.median for _, times in points], marker="o", markersize=3, label=label)
                axis.fill_between(x, [t.p10 for _, t in points], [t.p90 for _, t in points], alpha=0.2)
            axis.set_title(panel.title, fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{tick:g}" for tick in x])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    figure.supxlabel(f"{x_label}\n{caption}", fontsize=8)
    figure.supylabel("milliseconds", fontsize=9)
    figure.suptitle(title)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
