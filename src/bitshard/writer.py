"""Checkpoints on disk, written: shard by shard, resumable, atomic.

Everything goes to `OUT.partial`, one shard for each decoder block, each under a temporary name until it is whole. The
folder is renamed when the last one is in: OUT exists complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitshard.checkpoint import INDEX, REPORT, read_json, reason
from bitshard.errors import CheckpointError
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.quantconfig import QuantConfig

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*")
REWRITTEN = ("config.json", "quantize_config.json", INDEX, REPORT)
TASK = "task.json"  # what a partial folder is the beginning of
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writer:
    """Writes a checkpoint folder shard by shard, resumable, never half-written under its final name.

    shards: keys of the shards in order. task: what is being done; a partial folder of the same task is resumed, one of
    another task is emptied. layout: name that every shard's metadata says. Raises CheckpointError when `out` exists or
    another process is writing it.
    """

    def __init__(self, out: Path, shards: list[str], task: Mapping[str, Any], layout: str = GptqLayout.name) -> None:
        if os.path.lexists(out):
            raise CheckpointError(str(out), "an existing file or folder", "a new name", "choose another or remove it")
        self._metadata = {"format": "pt", "bitshard": json.dumps({"version": FORMAT_VERSION, "layout": layout})}
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self._files = {key: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, key in enumerate(shards, 1)}
        try:
            self._begin(json.dumps(task, sort_keys=True).encode())
        except OSError as error:
            raise self._failure(error) from None

    def _begin(self, task: bytes) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        if not self._is_ours():
            raise CheckpointError(
                str(self.partial), f"a folder without {TASK}, so not an earlier run's", "no such folder",
                "move it away, or choose another output name",
            )  # fmt: skip
        descriptor = os.open(self.partial / TASK, os.O_RDWR | os.O_CREAT, 0o666)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        self._lock(descriptor)
        same = os.pread(descriptor, len(task) + 1, 0) == task
        for path in self.partial.iterdir():
            if path.name != TASK and (not same or ".tmp" in path.name):
                path.unlink()
        if not same:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, task, 0)

    def _is_ours(self) -> bool:
        """True for a folder that a run began, or that one finished and died before giving it its name."""
        found = {path.name for path in self.partial.iterdir()}
        config = read_json(self.partial / "config.json") if "config.json" in found else {}
        return not found or TASK in found or "bitshard" in config.get("quantization_config", {})

    def _lock(self, descriptor: int) -> None:
        """Keep other processes out until the descriptor is closed or this process ends."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    str(self.partial), "another run that is writing it", "one at a time",
                    "wait for it, or choose another output name",
                ) from None  # fmt: skip
            # a network file system without locks: there it is the user who must not start two runs

    def has(self, shard: str) -> bool:
        """True when an earlier run finished this shard."""
        return (self.partial / self._files[shard]).exists()

    def write(self, shard: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard under a temporary name, then rename it."""
        self.write_state(self._files[shard], tensors)

    def write_state(self, file_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Any tensors, whole or not at all, in the partial folder."""
        temporary = self.partial / (file_name + ".tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, self._metadata)
            _sort_metadata(temporary)
            shutil.copymode(self.partial / TASK, temporary)  # safetensors makes files that only their owner reads
            temporary.rename(self.partial / file_name)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise self._failure(error) from None

    def finish(
        self,
        source: Path,
        config: Mapping[str, Any],
        quantization: QuantConfig,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        """Index, configs, the source's tokenizer and other small files, a report; then the final name."""
        try:
            weight_map, total = {}, 0
            for file_name in self._files.values():
                with safe_open(self.partial / file_name, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        weight_map[name] = file_name
                total += (self.partial / file_name).stat().st_size
            section = quantization.to_json()
            self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
            self._write_json("config.json", {**config, "quantization_config": section})
            if isinstance(quantization.layout, GptqLayout):
                self._write_json("quantize_config.json", section)
            if report is not None:
                self._write_json(REPORT, report)
            keep = {*self._files.values(), *REWRITTEN, *self._copy_side_files(source)}
            for path in self.partial.iterdir():
                if path.name not in keep and path.name != TASK:
                    path.unlink()
            (self.partial / TASK).unlink()  # not before all else is done: it says whose folder this is
            self.partial.rename(self.out)
            self._unlock()
        except (OSError, SafetensorError) as error:
            raise self._failure(error) from None

    def _copy_side_files(self, source: Path) -> list[str]:
        """Names of the copied files: all small ones but those written anew and indexes of other files."""
        copied = []
        for path in {path for pattern in SIDE_FILES for path in source.glob(pattern)}:
            if path.is_file() and path.name not in (*REWRITTEN, TASK) and not path.name.endswith(".index.json"):
                shutil.copyfile(path, self.partial / path.name)
                copied.append(path.name)
        return copied

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        (self.partial / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _failure(self, error: Exception) -> CheckpointError:
        system = re.search(r"os error (\d+)", str(error))  # how safetensors passes it on
        number = error.errno if isinstance(error, OSError) else int(system[1]) if system else None
        if number in NO_ROOM:
            return CheckpointError(
                str(self.partial), "no room left on the disk", "room for the whole checkpoint",
                "make room and run the same command again: finished shards are kept",
            )  # fmt: skip
        return CheckpointError(
            str(self.partial), reason(error), "a folder that can be written",
            "choose another place, or allow it and run the same command again",
        )  # fmt: skip


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that changes from run to run; equal content must be equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # what follows the header is data
        file.seek(8)
        file.write(text.ljust(length))  # the format allows trailing spaces
