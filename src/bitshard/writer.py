"""Checkpoints on disk, written: shard by shard, resumable, atomic.

Everything goes to `OUT.partial`, one shard for each decoder block, each under a temporary name until it is whole and on
the disk. The folder is renamed when the last one is in: OUT exists complete or not at all.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitshard.checkpoint import CARD, INDEX, REPORT, TASK, reason
from bitshard.errors import CheckpointError
from bitshard.layout import FORMAT_VERSION, GptqLayout

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*")
REWRITTEN = ("config.json", "quantize_config.json", INDEX, REPORT)
OUTSIDE = "outside the blocks"  # the shard of all that no decoder block has
OURS = "bitshard"  # the key in it that nobody else's has
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Task:
    """What a run does: its options by name, and digests of what it reads, by what to call it in a message."""

    options: Mapping[str, Any]
    digests: Mapping[str, str]

    def to_json(self) -> bytes:
        return json.dumps({OURS: vars(self)}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Task | None:
        """None for what `to_json` did not write."""
        try:
            return cls(**json.loads(text)[OURS])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def instead_of(self, other: Task) -> str:
        """How this task differs from another: the digests follow from the options, so only where those agree."""
        names = [*other.options, *(self.options.keys() - other.options.keys())]
        mine, its = self.options, other.options
        differ = [f"{n} {mine.get(n)}, not {its.get(n)}" for n in names if mine.get(n) != its.get(n)]
        another = [f"another {name}" for name, digest in other.digests.items() if self.digests.get(name) != digest]
        return "; ".join(differ or another)


def block_shard(layer: int) -> str:
    """The shard of one decoder block."""
    return f"block {layer}"


class Writer:
    """Writes a checkpoint folder shard by shard, resumable, never half-written under its final name.

    shards: keys of the shards in order. task: what is being done; a partial folder of the same task is resumed.
    layout: name that every shard's metadata says. Raises CheckpointError when `out` exists, another process is writing
    it, or the partial folder is anything but the same task's; that is left as it is.
    """

    def __init__(self, out: Path, shards: list[str], task: Task, layout: str = GptqLayout.name) -> None:
        self._metadata = {"format": "pt", "bitshard": json.dumps({"version": FORMAT_VERSION, "layout": layout})}
        self.out = out
        self._refuse_existing()
        try:
            str(out).encode()
        except UnicodeEncodeError:  # safetensors takes no other names
            raise CheckpointError(ascii(str(out)), "a name that is not UTF-8", "UTF-8", "choose another") from None
        self.partial = out.with_name(out.name + ".partial")
        self._files = {key: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, key in enumerate(shards, 1)}
        try:
            self._begin(task)
        except OSError as error:
            raise self._failure(error) from None

    def _refuse_existing(self, fix: str = "choose another or remove it") -> None:
        if os.path.lexists(self.out):
            raise CheckpointError(str(self.out), "an existing file or folder", "a new name", fix)

    def _begin(self, task: Task) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in self.partial.iterdir()}
        if found and TASK not in found:
            raise self._foreign(f"a folder without {TASK}")
        descriptor = os.open(self.partial / TASK, os.O_RDWR | os.O_CREAT, 0o666)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        self._lock(descriptor)
        self._refuse_existing()  # which the run that had the lock may have finished
        text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        before = Task.from_json(text)
        # nothing beside an empty file: that run died before it had written what it does
        if before is None and (text or found > {TASK}):
            raise self._foreign(f"a {TASK} that bitshard did not write")
        for path in self.partial.glob("*.tmp*"):
            path.unlink()
        if before == task:
            self._remove_damaged()
            return
        if before is not None and any(path.name != TASK for path in self.partial.iterdir()):
            raise CheckpointError(
                str(self.partial), f"an unfinished run with {before.instead_of(task)}", "the same command again",
                f"repeat that one, remove {self.partial.name} to start anew, or choose another output name",
            )  # fmt: skip
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, task.to_json(), 0)
        os.fsync(descriptor)

    def _foreign(self, found: str) -> CheckpointError:
        return CheckpointError(
            str(self.partial), f"{found}, so not an earlier run's", "no such folder",
            "move it away, or choose another output name",
        )  # fmt: skip

    def _remove_damaged(self) -> None:
        """What a broken disk or file system cut off is as good as not written."""
        for path in self.partial.glob("*.safetensors"):
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError:
                path.unlink()

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
            _sync(temporary)
            temporary.rename(self.partial / file_name)
            _sync(self.partial)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise self._failure(error) from None

    def finish(
        self,
        source: Path,
        config: Mapping[str, Any],
        section: Mapping[str, Any],
        report: Mapping[str, Any] | None = None,
        card: str | None = None,
    ) -> None:
        """Index, configs, the source's tokenizer and other small files, a report and a card; then the final name.

        section: of config.json, `quantization_config`. Without a card of its own it gets the source's.
        """
        try:
            weight_map, total = {}, 0
            for file_name in self._files.values():
                with safe_open(self.partial / file_name, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        weight_map[name] = file_name
                total += (self.partial / file_name).stat().st_size
            self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
            self._write_json("config.json", {**config, "quantization_config": section})
            if section["quant_method"] == GptqLayout.method:
                self._write_json("quantize_config.json", section)
            if report is not None:
                self._write_json(REPORT, report)
            self._copy_side_files(source)
            if card is not None:
                (self.partial / CARD).write_text(card, encoding="utf-8")
                _sync(self.partial / CARD)
            _sync(self.partial)
            self._refuse_existing("move it away and run the same command again: finished shards are kept")
            self.partial.rename(self.out)
            _sync(self.out.parent)
            for path in self.out.glob("*.safetensors"):  # no reader minds the rest, should a kill leave it here
                if path.name not in self._files.values():
                    path.unlink()
            (self.out / TASK).unlink()
            self._unlock()
        except (OSError, SafetensorError) as error:
            raise self._failure(error) from None

    def _copy_side_files(self, source: Path) -> None:
        """All small files but those written anew and indexes of other files."""
        for path in {path for pattern in SIDE_FILES for path in source.glob(pattern)}:
            if path.is_file() and path.name not in (*REWRITTEN, TASK) and not path.name.endswith(".index.json"):
                if not os.access(path, os.R_OK):
                    raise CheckpointError(
                        str(path), "a file that cannot be read", "one that can",
                        "run the same command again then: finished shards are kept",
                    )  # fmt: skip
                shutil.copyfile(path, self.partial / path.name)
                _sync(self.partial / path.name)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        (self.partial / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _sync(self.partial / name)

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


def _sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)  # never the task's: closing a second one gives up its lock
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, as some network ones for folders
            raise
    finally:
        os.close(descriptor)
