"""Changes to a checkpoint folder made by tests.factory: tensors, configs, shards, bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitshard.checkpoint import INDEX

WEIGHTS = "model.safetensors"
Change = Callable[[Path], None]


def tensors(changes: Mapping[str, torch.Tensor | None], metadata: dict[str, str] | None = None) -> Change:
    """Replace or add tensors of a one-file checkpoint; None leaves one out."""

    def change(folder: Path) -> None:
        found: dict[str, Any] = load_file(folder / WEIGHTS) | dict(changes)
        whole = {name: tensor.clone() for name, tensor in found.items() if tensor is not None}
        save_file(whole, folder / WEIGHTS, metadata or {"format": "pt"})

    return change


def without(part: str) -> Change:
    """Leave out every tensor with `part` in its name."""
    return lambda folder: tensors({name: None for name in load_file(folder / WEIGHTS) if part in name})(folder)


def json_file(name: str, changes: Mapping[str, Any]) -> Change:
    """Set keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return change


def config(**changes: Any) -> Change:
    return json_file("config.json", changes)


def section(**changes: Any) -> Change:
    """Set keys of the quantization section in both files."""

    def change(folder: Path) -> None:
        json_file("quantize_config.json", changes)(folder)
        quantize_config = json.loads((folder / "quantize_config.json").read_text())
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            config(quantization_config=quantize_config)(folder)

    return change


def content(name: str, value: bytes) -> Change:
    """Make a file that holds exactly this."""
    return lambda folder: (folder / name).write_bytes(value) and None


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def altered(change_bytes: Callable[[bytes], bytes], name: str = WEIGHTS) -> Change:
    return lambda folder: (folder / name).write_bytes(change_bytes((folder / name).read_bytes())) and None


def sharded(folder: Path, count: int = 3) -> None:
    """Cut a one-file checkpoint into shards with an index."""
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(whole)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        own = names[i::count]
        save_file({name: whole[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def merged(folder: Path) -> None:
    """The opposite of `sharded`."""
    whole = {}
    for shard in folder.glob("*.safetensors"):
        whole |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(whole, folder / WEIGHTS, {"format": "pt"})


def steps(*changes: Change) -> Change:
    """One change after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def header(change_header: Callable[[dict[str, Any]], None]) -> Change:
    """Rewrite the JSON header of the weights, and nothing after it."""

    def change_bytes(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        value = json.loads(data[8:end])
        change_header(value)
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return altered(change_bytes)
