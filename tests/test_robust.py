"""convert in a hostile world: full disks, Ctrl-C, kill -9, two runs at once, sources that change; and its memory."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alter import WEIGHTS, altered, section, tensors
from bitshard.checkpoint import INDEX
from bitshard.convert import convert
from bitshard.errors import CheckpointError
from bitshard.models import architecture, block_linears, shapes
from bitshard.spec import QuantSpec
from bitshard.writer import Task, Writer
from commands import bitshard, refusal
from dense import random_model, random_text
from factory import random_checkpoint
from kill import Killed, counting_down

MIB = 1 << 20
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "in"
    return random_checkpoint(folder, "llama", QuantSpec(4, 16, False, True), num_hidden_layers=3)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run writes."""
    convert(source, tmp_path_factory.mktemp("expected") / "out")
    return digest(tmp_path_factory.getbasetemp() / "expected0" / "out")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def after(count: int, then: Callable[[], Any]) -> Any:
    """Writer.write that does `then` when `count` shards have been written."""
    write, written = Writer.write, 0

    def counting(self: Writer, *args: Any) -> None:
        nonlocal written
        if written == count:
            then()
        write(self, *args)
        written += 1

    return counting


def killed() -> None:
    raise Killed


@contextmanager
def dies_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Writer, "write", after(count, killed))
        yield


def test_dies_before_any_change_on_disk(source: Path, expected: dict[str, str], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """What is on disk changes its meaning only by renaming and removing: die before each of these, in turn."""
    die_before = counting_down(monkeypatch)
    for point in range(1, 100):
        out = tmp_path / f"out-{point}"
        die_before(point)
        try:
            convert(source, out)
        except Killed:
            if out.exists():  # it has its name before task.json leaves it
                assert digest(out).items() >= expected.items() and len(digest(out)) == len(expected) + 1
                assert "found an existing file" in refusal("convert", source, out) and bitshard("verify", out).code == 0
                continue
            convert(source, out)
        else:
            break
        assert digest(out) == expected, f"died before change {point}"
    assert point > 1 + 3 + 2, "too few kill points were seen"


STOPPED = """
import os, sys
import torch
from bitshard.cli import main
from bitshard.writer import Task, Writer
torch.set_num_threads(1)
number, write, written = int(sys.argv.pop()), Writer.write, []
def stopping(self, shard, tensors):
    write(self, shard, tensors)
    written.append(shard)
    if len(written) == 2:
        sys.stdin.readline()
        os.kill(os.getpid(), number)
Writer.write = stopping
main()
"""


def test_signals_in_the_middle(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C and kill -9 between shards; while a run is alive no other writes there, and after it the next goes on."""
    runs: dict[signal.Signals, subprocess.Popen[str]] = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        command = [sys.executable, "-c", STOPPED, "convert", str(source), str(tmp_path / number.name), str(int(number))]
        pipe = subprocess.PIPE
        runs[number] = subprocess.Popen(command, env=ENVIRONMENT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    for number, run in runs.items():
        out, partial = tmp_path / number.name, tmp_path / f"{number.name}.partial"
        while len(shards := list(partial.glob("model-*.safetensors"))) < 2:
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        assert f"{partial}: found another run that is writing it" in refusal("convert", source, out)
        finished = {path.name: path.stat().st_ino for path in shards}
        stdout, stderr = run.communicate("go on\n", timeout=60)
        assert not stdout and not out.exists()
        if number == signal.SIGINT:
            assert run.returncode == 1
            assert stderr.splitlines()[-1].startswith("bitshard: interrupted; what was finished is kept")
        else:
            assert run.returncode == -signal.SIGKILL
        (partial / ".tmpAbCdEf").touch()  # what safetensors leaves when it is killed
        convert(source, out)
        assert digest(out) == expected
        assert finished.items() <= {path.name: path.stat().st_ino for path in out.iterdir()}.items()


@pytest.mark.parametrize("change", ["weights", "config", "same size and time", "padding"])
def test_another_task_is_refused(change: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unfinished run left stays, until the user says that it may go."""
    own, out = Path(shutil.copytree(source, tmp_path / "in")), tmp_path / "out"
    with dies_after(3, monkeypatch):
        convert(own, out)
    left, time = digest(tmp_path / "out.partial"), (own / WEIGHTS).stat().st_mtime_ns
    assert len(left) == 4
    if change == "config":
        section(damp_percent=0.5)(own)
    elif change != "padding":
        name = "model.layers.0.self_attn.q_proj.qweight"
        tensors({name: load_file(own / WEIGHTS)[name].flip(0)})(own)
        if change == "same size and time":
            os.utime(own / WEIGHTS, ns=(time, time))
    options = ["--pad-to", 32] if change == "padding" else []
    says = "pad_to None, not 32" if change == "padding" else "another model"
    sentence = refusal("convert", own, out, *options)
    assert f"out.partial: found an unfinished run with {says}; allowed: the same command again" in sentence
    assert digest(tmp_path / "out.partial") == left and not out.exists()
    shutil.rmtree(tmp_path / "out.partial")
    assert bitshard("convert", own, out, *options).code == 0


def test_a_task_of_another_verb_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dies_after(1, monkeypatch):
        convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="an unfinished run with verb convert, not quantize; .*pad_to None, not"):
        Writer(tmp_path / "out", ["all"], Task({"verb": "quantize", "pad_to": 2}, {}))


def test_a_task_that_has_done_nothing_is_forgotten(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Killed before its first shard, or before it had written what it does."""
    for text in (b"", Task({"verb": "quantize"}, {}).to_json()):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "task.json").write_bytes(text)
        convert(source, tmp_path / "out")
        assert digest(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 7, 500])
def test_a_damaged_shard_is_written_again(kept: int, source: Path, expected: dict[str, str], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As a power cut may leave it, on a disk that does not keep its promises."""
    with dies_after(3, monkeypatch):
        convert(source, tmp_path / "out")
    altered(lambda data: data[:kept], "model-00002-of-00004.safetensors")(tmp_path / "out.partial")
    convert(source, tmp_path / "out")
    assert digest(tmp_path / "out") == expected


def test_everything_is_on_the_disk_before_it_gets_its_name(source: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    synced: set[int] = set()
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checked(path: Path, target: Path) -> Path:
        for one in (path, *(path.iterdir() if path.is_dir() else ())):
            assert one.stat().st_ino in synced, one
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    convert(source, tmp_path / "out")
    assert tmp_path.stat().st_ino in synced


@pytest.mark.parametrize("appears", ["folder", "full folder", "file"])
def test_out_appears_meanwhile(appears: str, source: Path, expected: dict[str, str], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out"

    def appear() -> None:
        if appears != "file":
            out.mkdir()
        if appears != "folder":
            (out / "mine" if out.is_dir() else out).write_text("mine")

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", after(2, appear))
        sentence = refusal("convert", source, out)
    assert "out: found an existing file or folder" in sentence and "run the same command again" in sentence
    left = stamps(tmp_path / "out.partial")
    out.rename(tmp_path / "elsewhere")
    convert(source, out)
    assert digest(out) == expected and stamps(out) == left and len(left) == 4


def test_a_run_that_starts_while_another_finishes(source: Path, expected: dict[str, str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """It has opened the folder that is about to get its name, and waits for nothing of it."""
    out, lock = tmp_path / "out", Writer._lock
    with dies_after(3, monkeypatch):
        convert(source, out)

    def late(self: Writer, descriptor: int) -> None:
        monkeypatch.setattr(Writer, "_lock", lock)
        convert(source, out)
        lock(self, descriptor)

    monkeypatch.setattr(Writer, "_lock", late)
    assert "out: found an existing file or folder" in refusal("convert", source, out)
    assert digest(out) == expected and not (tmp_path / "out.partial").exists()


def stamps(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("model-*.safetensors")}


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_full_disk(written: int, source: Path, expected: dict[str, str], tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """safetensors passes the system's error on as text, so this is its text."""

    def full() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    count = 0

    def save(*args: Any) -> None:
        nonlocal count
        if count == written:
            full()
        count += 1
        save_file(*args)

    with monkeypatch.context() as patched:
        patched.setattr("bitshard.writer.save_file", save)
        sentence = refusal("convert", source, tmp_path / "out", "--json")
    assert "out.partial: found no room left on the disk" in sentence and "run the same command again" in sentence
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial/*tmp*"))
    assert bitshard("convert", source, tmp_path / "out", "--json").code == 0
    assert digest(tmp_path / "out") == expected


def test_a_disk_that_fills_at_the_last_file(source: Path, expected: dict[str, str], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        patched.setattr(Path, "write_text", full)
        assert "no room left on the disk" in refusal("convert", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
    assert digest(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two of four shards."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(source: Path, expected: dict[str, str], small_disk: Path) -> None:
    assert "no room left on the disk" in refusal("convert", source, small_disk / "out")
    kept = {path.name: path.stat().st_ino for path in small_disk.glob("out.partial/model-*")}
    assert kept and not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    convert(source, small_disk / "out")
    assert digest(small_disk / "out") == expected
    assert kept.items() <= {path.name: path.stat().st_ino for path in (small_disk / "out").iterdir()}.items()


def test_a_limit_on_the_size_of_files(source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        sentence = refusal("convert", source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no room left on the disk" in sentence and not (tmp_path / "out").exists()


def occupied(out: Path) -> None:
    out.mkdir()


def dangling(out: Path) -> None:
    out.symlink_to("nowhere")


def partial_of_somebody_else(out: Path) -> None:
    out.with_name("out.partial").mkdir()
    (out.with_name("out.partial") / "thesis.txt").write_text("mine")


def with_files(**files: str) -> Callable[[Path], None]:
    """A partial folder with a thesis and what might pass for a run's."""

    def place(out: Path) -> None:
        partial_of_somebody_else(out)
        for name, text in files.items():
            (out.with_name("out.partial") / f"{name}.json").write_text(text)

    return place


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (occupied, "out: found an existing file or folder"),
    "file": (Path.touch, "out: found an existing file or folder"),
    "link": (dangling, "out: found an existing file or folder"),
    "partial of another": (partial_of_somebody_else, "out.partial: found a folder without task.json"),
    **{
        f"partial with a config that says {section}": (
            with_files(config=f'{{"quantization_config": {section}}}'),
            "out.partial: found a folder without task.json",
        )
        for section in ("null", "5", '"bitshard"', '{"bitshard": {}}')
    },
    **{
        f"partial with a task of {text}": (
            with_files(task=text),
            "out.partial: found a task.json that bitshard did not write",
        )
        for text in ("", "{", "5", '{"my": "own task"}', '{"bitshard": "my own task"}')
    },
    "partial a file": (lambda out: out.with_name("out.partial").touch(), "out.partial: found File exists"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_there_stays(place: str, source: Path, tmp_path: Path) -> None:
    prepare, sentence = PLACES[place]
    prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert sentence in refusal("convert", source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "out.partial: found Not a directory" in refusal("convert", source, tmp_path / "file" / "out")
    assert "found File name too long" in refusal("convert", source, tmp_path / ("x" * 300))


def test_files_are_as_readable_as_any_other(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "any").touch()
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_side_files_come_along(source: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(source, tmp_path / "in"))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE.txt", "pytorch_model.bin.index.json", "task.json"):
        (own / name).write_text("{}")
    (own / "LICENSES.json").mkdir()
    convert(own, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()} - {
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    }
    assert found == {
        "config.json", "quantize_config.json", INDEX, "tokenizer.json", "chat_template.jinja", "LICENSE.txt",
    }  # fmt: skip


MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bitshard.convert import convert
from bitshard.errors import CheckpointError
def peak():
    # of this program alone: ru_maxrss would start at what the parent process had
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
folder, peaks = Path(sys.argv[1]), []
for name in ("1", "2", "8"):  # the first, a small one, is for what libraries allocate once
    convert(folder / name, folder / f"{name}-out")
    peaks.append(peak())
print(*peaks)
"""


def large_checkpoint(folder: Path, blocks: int, hidden: int, intermediate: int) -> int:
    """Random words in every matrix; returns the bytes of one block."""
    heads = 16
    value = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "quantization_config": {"bits": 4, "group_size": 128, "desc_act": True, "quant_method": "gptq"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(value))
    arch, weight_map, generator = architecture(value), {}, torch.Generator().manual_seed(0)
    for layer in range(blocks):
        own = {}
        for linear in block_linears(arch, shapes(arch, value)):
            name, k, n = f"model.layers.{layer}.{linear.name}", linear.in_features, linear.out_features
            words = torch.randint(-(2**31), 2**31, (k // 8, n), generator=generator, dtype=torch.int64)
            own[f"{name}.qweight"] = words.to(torch.int32)
            own[f"{name}.qzeros"] = torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32)
            own[f"{name}.scales"] = torch.ones(k // 128, n).half()
            own[f"{name}.g_idx"] = (torch.randperm(k, generator=generator) // 128).to(torch.int32)
        save_file(own, folder / f"{layer}.safetensors")
        weight_map |= dict.fromkeys(own, f"{layer}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in own.values())


def test_memory_is_one_blocks(tmp_path: Path) -> None:
    """What convert's docstring says: three blocks' worth at most, however many blocks there are."""
    large_checkpoint(tmp_path / "1", 1, 512, 1024)
    block = large_checkpoint(tmp_path / "2", 2, 2048, 6144)
    large_checkpoint(tmp_path / "8", 8, 2048, 6144)
    # so that malloc gives back what is freed, and two runs measure the same
    environment = ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], env=environment, capture_output=True, text=True)
    small, two, eight = (int(number) for number in done.stdout.split())
    assert block > 25 * MIB
    assert two - small < 3 * block
    assert eight - two < block / 4


QUANTIZE_MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from bitshard.pipeline import Calibration, quantize
from bitshard.spec import MixSpec
def anonymous():  # without the pages of mapped files, which are the system's to drop
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
folder, peaks, peak = Path(sys.argv[1]), [], 0
threading.Thread(target=watch, daemon=True).start()
for name in ("1", "2", "10"):  # the first is for what libraries allocate once
    peak = 0
    quantize(folder / name, folder / f"{name}-out", MixSpec(), Calibration(folder / "text.txt", 4, 16))
    peaks.append(peak)
print(*peaks)
"""


@pytest.mark.slow
def test_memory_of_quantize_is_one_blocks(tmp_path: Path) -> None:
    """What pipeline's docstring says: no more for more blocks."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024}
    for blocks in (1, 2, 10):
        random_model(tmp_path / str(blocks), "llama", num_hidden_layers=blocks, **sizes)
    (tmp_path / "text.txt").write_text(random_text(200))
    block = 4 * (2 * 512 * 512 + 3 * 512 * 1024)  # at least: k and v depend on the heads
    command = [sys.executable, "-c", QUANTIZE_MEMORY, tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    _, two, ten = (int(number) for number in done.stdout.split())
    assert ten - two < block  # eight more
