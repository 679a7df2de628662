"""Checkpoints on disk, read: a folder of safetensors with its config. Maps files and copies nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitshard.errors import CheckpointError, FormatError
from bitshard.layout import GptqLayout, Layout, check_g_idx
from bitshard.mixed import MixedWeight
from bitshard.models import Architecture, Linear, Shapes, architecture, block_linears, shapes
from bitshard.plan import TPPlan
from bitshard.quantconfig import QuantConfig, check_version, parse_quant_config
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import MixSpec, QuantSpec

INDEX = "model.safetensors.index.json"
REPORT = "quantization_report.json"  # what quantizing left behind, matrix by matrix
CARD = "README.md"
TASK = "task.json"  # what a folder is the beginning of, where it is unfinished
ENDS = 1 << 20  # bytes at either end of a file that tell it from another of the same size and time
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "no such file", "a JSON file", "check the folder's name") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise CheckpointError(str(path), reason(error), "a readable JSON file", "get the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"a JSON {type(value).__name__}", "a JSON object", "get the file again")
    return value


def reason(error: Exception) -> str:
    """What an exception says, without the path that the sentence around it has already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file, and CheckpointError with its name for whatever is wrong with it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            str(path), f"a file that cannot be read ({reason(error)})", "a readable file", "check the file"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            str(path), f"a file that is truncated or altered ({error})", "a whole safetensors file", "get it again"
        ) from None


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors with its config. Holds names and places; a tensor is read when it is asked for."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]  # tensor name -> file
    quantization: QuantConfig | None

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config and names, and check that every file is whole. Raises CheckpointError or FormatError."""
        try:
            os.listdir(path)
        except OSError as error:
            raise CheckpointError(str(path), reason(error), "a checkpoint folder or hub id", "check the name") from None
        if (path / TASK).exists() and path.suffix == ".partial":
            raise CheckpointError(
                str(path), "an unfinished run", "a finished checkpoint", "give its command again: it goes on from there"
            )
        config = read_json(path / "config.json")
        quantization = _quantization(path, config)
        checkpoint = cls(path, config, _tensor_files(path, quantization), quantization)
        checkpoint._check_names()
        return checkpoint

    @property
    def arch(self) -> Architecture:
        return architecture(self.config, str(self.path / "config.json"))

    @property
    def sizes(self) -> Shapes:
        return shapes(self.arch, self.config, str(self.path / "config.json"))

    @property
    def quantized(self) -> QuantConfig:
        """The quantization config of a checkpoint that must have one."""
        if self.quantization is None:
            raise FormatError(
                str(self.path / "config.json"), "no quantization_config", "a quantized checkpoint",
                "quantize the model first: bitshard quantize",
            )  # fmt: skip
        return self.quantization

    @property
    def gptq(self) -> QuantConfig:
        """The quantization config of a checkpoint that must be a GPTQ one."""
        if not isinstance(self.quantized.layout, GptqLayout):
            raise FormatError(
                str(self.path / "config.json"),
                f"layout {self.quantized.layout.name}, whose channels are in order already",
                "a GPTQ checkpoint",
                "use it as it is",
            )
        return self.quantized

    @property
    def layout(self) -> Layout:
        return self.quantized.layout

    @cached_property
    def _linears(self) -> dict[str, Linear]:
        """Every matrix of a decoder block by its name below the block."""
        return {linear.name: linear for linear in block_linears(self.arch, self.sizes)}

    def size_of(self, module: str) -> tuple[int, int] | None:
        """K and N of a matrix of the decoder blocks, as config.json has them; None for any other."""
        linear = self._linears.get(re.sub(rf"{re.escape(self.arch.blocks)}\.\d+\.", "", module, count=1))
        return (linear.in_features, linear.out_features) if linear else None

    def plan(self) -> TPPlan:
        """The cuts of this checkpoint, with the row-parallel matrices whose input is gathered, and the outliers.

        Raises FormatError when a matrix is missing, has other sizes than config.json gives it, or a broken `g_idx`.
        """
        uncut = TPPlan(self.arch, self.sizes, self.spec_of)
        self._check_blocks(uncut)
        rows = [n for i in range(self.sizes.layers) for n, linear in uncut.linears(i) if linear.role == "row"]
        counts = self.shapes(name for name in self.files if name.endswith(".outlier_values"))
        outliers = {name.rpartition(".")[0]: shape[0] for name, shape in counts.items()}
        return replace(uncut, gathered=frozenset(filter(self.is_irregular, rows)), outliers=outliers)

    def spec_of(self, module: str) -> QuantSpec | MixSpec | None:
        """Spec of one matrix; None where it stays 16-bit."""
        if self.quantization is None or f"{module}.qweight" not in self.files:
            return None
        return self.quantization.spec_of(module)

    def matrices(self) -> list[str]:
        """Names of the quantized matrices, in file order."""
        return [name.removesuffix(".qweight") for name in self.files if name.endswith(".qweight")]

    def absent(self, names: Iterable[str]) -> list[str]:
        """Those of a running model's tensors that no file has."""
        return sorted(set(names) - set(map(self.arch.module_name, self.files)))

    def is_irregular(self, module: str) -> bool:
        """True when the matrix asks for its input channels in another order. Reads `g_idx` alone."""
        g_idx, spec = self.g_idx(module), self.spec_of(module)
        if g_idx is None or not isinstance(spec, QuantSpec):
            return f"{module}.strip_order" in self.files
        return not torch.equal(g_idx.to(torch.int32), trivial_g_idx(len(g_idx), spec.group(len(g_idx))))

    def g_idx(self, module: str) -> torch.Tensor | None:
        """The group of each input channel as the file has it, checked; None where the file has none."""
        spec, name = self.spec_of(module), f"{module}.g_idx"
        if not isinstance(spec, QuantSpec) or name not in self.files:
            return None
        g_idx = self.tensor(name)
        check_g_idx(self.where(module), g_idx, spec)
        return g_idx

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, mapped from their files."""
        names = list(names)
        missing = [name for name in names if name not in self.files]
        if missing:
            raise CheckpointError(str(self.path), f"no tensor {missing[0]}", "the model's tensors", "get it again")
        tensors: dict[str, torch.Tensor] = {}
        for path, own in self._by_file(names).items():
            with _opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in own}
        return {name: tensors[name] for name in names}

    def shapes(self, names: Iterable[str]) -> dict[str, list[int]]:
        """Shapes of those of the named tensors that exist; reads headers alone."""
        shapes: dict[str, list[int]] = {}
        for path, own in self._by_file(name for name in names if name in self.files).items():
            with _opened(path) as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in own}
        return shapes

    def dtypes(self, names: Iterable[str]) -> dict[str, str]:
        """Dtypes of those of the named tensors that exist, as safetensors names them; reads headers alone."""
        dtypes: dict[str, str] = {}
        for path, own in self._by_file(name for name in names if name in self.files).items():
            with _opened(path) as file:
                dtypes |= {name: file.get_slice(name).get_dtype() for name in own}
        return dtypes

    def _by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        return by_file

    def tensor(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def matrix_tensors(self, module: str) -> dict[str, torch.Tensor]:
        """A quantized matrix's tensors by suffix."""
        names = [f"{module}.{suffix}" for suffix in self.layout.suffixes if f"{module}.{suffix}" in self.files]
        return {name.rpartition(".")[2]: tensor for name, tensor in self.read(names).items()}

    def weight(self, module: str) -> QuantizedWeight | MixedWeight:
        """A quantized matrix as a logical value, fully checked."""
        spec = self.spec_of(module)
        if spec is None:
            raise FormatError(f"{module}.qweight", "no such tensor", "a quantized matrix", "check the module's name")
        tensors, size = self.matrix_tensors(module), self.size_of(module)
        return self.layout.unpack(self.where(module), tensors, spec, size)

    def where(self, module: str) -> str:
        """A quantized matrix's file and name, for messages."""
        return f"{self.files[f'{module}.qweight']}: {module}"

    def check_matrices(self) -> None:
        """All that can be known without reading all codes: `plan`'s checks, then every scale, zero, group and bias.

        Raises FormatError for what is wrong, and for a checkpoint that is not quantized.
        """
        layout = self.layout
        self.plan()
        for module in self.matrices():
            layout.check(self.where(module), self.matrix_tensors(module), self.spec_of(module), self.size_of(module))

    def names_in_block(self, layer: int) -> list[str]:
        prefix = f"{self.arch.blocks}.{layer}."
        return [name for name in self.files if name.startswith(prefix)]

    def names_outside_blocks(self) -> list[str]:
        blocks = re.compile(re.escape(self.arch.blocks) + r"\.\d+\.")
        return [name for name in self.files if not blocks.match(name)]

    def fingerprint(self) -> str:
        """A hash of configs, names, sizes, times, and the ends of every file: changes when the checkpoint does."""
        parts: list[Any] = [self.config, repr(self.quantization)]
        for path in sorted(set(self.files.values())):
            stat = path.stat()
            with path.open("rb") as file:
                ends = hashlib.sha256(file.read(ENDS))
                file.seek(max(0, stat.st_size - ENDS))
                ends.update(file.read(ENDS))
            parts.append((path.name, stat.st_size, stat.st_mtime_ns, ends.hexdigest()))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _check_names(self) -> None:
        """Config and tensors agree on what is quantized, and a quantized matrix has no tensor of unknown meaning."""
        modules = dict.fromkeys(self.matrices())
        if modules and self.quantization is None:
            raise FormatError(
                str(self.path / "config.json"),
                "qweight tensors and no quantization_config",
                "a quantization_config section or a quantize_config.json",
                "add the file that the quantizer wrote",
            )
        if self.quantization is None:
            return
        suffixes = self.layout.suffixes
        if not modules:
            raise FormatError(
                str(self.path),
                "a quantization_config and no qweight tensor",
                "quantized tensors",
                "get the files again",
            )
        for name in self.files:
            module, _, suffix = name.rpartition(".")
            if module in modules and suffix not in suffixes:
                raise FormatError(
                    f"{self.files[name]}: {name}", "an unknown tensor of a quantized matrix",
                    ", ".join(suffixes), "get the file again",
                )  # fmt: skip
            if module not in modules and suffix in suffixes and f"{module}.weight" not in self.files:
                raise FormatError(
                    f"{self.files[name]}: {name}",
                    "no qweight beside it",
                    "all tensors of a matrix",
                    "get the file again",
                )
        for module in modules:
            if self.quantization.spec_of(module) is None:
                raise FormatError(
                    f"{self.where(module)}.qweight", "a quantized matrix that the config's `dynamic` leaves 16-bit",
                    "one of the two", "correct `dynamic`, or get the file again",
                )  # fmt: skip

    def _check_blocks(self, plan: TPPlan) -> None:
        """Every matrix of every block is there, with the sizes that config.json gives it. Reads headers alone."""
        linears = [pair for layer in range(plan.sizes.layers) for pair in plan.linears(layer)]
        suffixes = ("weight", *(self.quantization.layout.suffixes if self.quantization else ()))
        found = self.shapes(f"{name}.{suffix}" for name, _ in linears for suffix in suffixes)
        for name, linear in linears:
            self._check_matrix(name, linear, {s: found[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in found})
        block = re.compile(re.escape(plan.arch.blocks) + r"\.(\d+)\.")
        for name in self.files:
            match = block.match(name)
            if match and int(match[1]) >= plan.sizes.layers:
                raise FormatError(
                    f"{self.files[name]}: {name}", f"a tensor of block {match[1]}",
                    f"{plan.sizes.layers} blocks, counted from 0, as in config.json", "correct config.json",
                )  # fmt: skip

    def _check_matrix(self, name: str, linear: Linear, tensors: Mapping[str, Sequence[int]]) -> None:
        size, spec = (linear.in_features, linear.out_features), self.spec_of(name)
        if spec is not None:
            self.layout.check_shapes(self.where(name), tensors, spec, size)
            return
        shape = list(tensors["weight"]) if "weight" in tensors else None
        if shape != [*reversed(size)]:
            suffix = "qweight" if shape is None and self.quantization is not None else "weight"
            raise FormatError(
                f"{self.files.get(f'{name}.weight', self.path)}: {name}.{suffix}",
                f"shape {shape}" if shape else "no such tensor",
                f"{size[0]} x {size[1]} channels, as config.json has it",
                "correct config.json, or get the files again",
            )


def _quantization(path: Path, config: Mapping[str, Any]) -> QuantConfig | None:
    inline, side = config.get("quantization_config"), path / "quantize_config.json"
    parsed = []
    if inline is not None:
        parsed.append(parse_quant_config(inline, str(path / "config.json")))
    if side.exists():
        parsed.append(parse_quant_config(read_json(side), str(side)))
    if len(parsed) == 2:
        _check_agreement(parsed[0], parsed[1], str(side))
    return parsed[0] if parsed else None


def _check_agreement(inline: QuantConfig, side: QuantConfig, where: str) -> None:
    """Two files that say how to read the codes must say the same: readers differ in which one they believe."""
    one, other = _reading(inline), _reading(side)
    for what in one:
        if one[what] != other.get(what):
            raise FormatError(
                where, f"{what} {other.get(what)}, and {one[what]} in config.json", "the same in both",
                "correct the file that is wrong, or delete quantize_config.json",
            )  # fmt: skip


def _reading(config: QuantConfig) -> dict[str, Any]:
    """What a reader must know of a section, by what to call it in a message."""
    layout, spec = config.layout, config.spec
    own: dict[str, Any] = vars(spec)
    if isinstance(layout, GptqLayout) and isinstance(spec, QuantSpec):
        own = {
            "bits": spec.bits,
            "group_size": spec.group_size,
            "zero-point version by checkpoint_format": layout.zeros_version,
        }
    return {"layout": layout.name, **own, "dynamic": dict(config.overrides)}


def _tensor_files(path: Path, quantization: QuantConfig | None) -> dict[str, Path]:
    """Tensor name -> file, every file opened once to see that it is whole."""
    if (path / INDEX).exists():
        return _indexed_files(path / INDEX, quantization)
    shards = sorted(path.glob("*.safetensors"))
    if len(shards) > 1:
        raise CheckpointError(
            str(path), f"{len(shards)} safetensors files and no {INDEX}", "one file, or an index", "get the index"
        )
    if not shards:
        pickles = sorted(p for pattern in PICKLES for p in path.glob(pattern))
        if pickles:
            raise CheckpointError(
                str(pickles[0]), "a pickle checkpoint", "safetensors; opening a pickle runs its code",
                "save it again with safe_serialization=True",
            )  # fmt: skip
        raise CheckpointError(str(path), "no .safetensors file", "a safetensors checkpoint", "check the folder")
    return dict.fromkeys(_names(shards[0], quantization), shards[0])


def _indexed_files(index: Path, quantization: QuantConfig | None) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            str(index), "no weight_map", "a weight_map from tensor names to file names", "get the file again"
        )
    names = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(str(index), f"shard {shard!r}", "names inside the folder", "do not use this file")
        if not (index.parent / shard).is_file():
            raise CheckpointError(str(index), f"shard {shard!r}, which is missing", "every shard", "get the file")
        names[shard] = _names(index.parent / shard, quantization)
    for name, shard in weight_map.items():
        if name not in names[shard]:
            raise CheckpointError(
                str(index.parent / shard), f"no tensor {name}, which the index promises", "what the index says",
                "get the file again",
            )  # fmt: skip
    unlisted = {name: index.parent / shard for shard in names for name in names[shard]}
    return unlisted | {name: index.parent / shard for name, shard in weight_map.items()}


def _names(shard: Path, quantization: QuantConfig | None) -> list[str]:
    """Names of a shard's tensors, after a check that what it says of itself is known and what the config says."""
    with _opened(shard) as file:
        ours, names = (file.metadata() or {}).get("bitshard", "{}"), list(file.keys())
    try:
        layout = check_version(json.loads(ours), str(shard)).name
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            str(shard), f"metadata that is no JSON ({error})", "a whole file", "get it again"
        ) from None
    if quantization and "layout" in json.loads(ours) and layout != quantization.layout.name:
        raise FormatError(
            str(shard), f"bitshard layout {layout!r}", f"{quantization.layout.name!r}, as config.json has it",
            "get the files again",
        )  # fmt: skip
    return names
