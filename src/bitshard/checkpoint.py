"""Checkpoints on disk: streamed safetensors in and out, the quantization config, atomic replace, resume.

Reading maps files and copies nothing. Writing makes `OUT.partial`, one shard for each decoder block, each under a
temporary name until it is whole, and renames the folder when the last one is in: OUT exists complete or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitshard.errors import CheckpointError, FormatError
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.models import Architecture, Shapes, architecture, shapes
from bitshard.plan import TPPlan
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import WORD_BITS, QuantSpec

INDEX = "model.safetensors.index.json"
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*")
REWRITTEN = ("config.json", "quantize_config.json", INDEX)
OUR_KEYS = (*QuantSpec.__dataclass_fields__, "quant_method", "checkpoint_format", "format", "dynamic", "bitshard")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class QuantConfig:
    """The quantization section of a GPTQ checkpoint. overrides: GPTQModel's `dynamic`, pattern -> settings or None."""

    spec: QuantSpec
    layout: GptqLayout
    overrides: tuple[tuple[str, dict[str, Any] | None], ...] = ()
    section: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # other keys of the file, kept as they are

    def spec_of(self, module: str) -> QuantSpec | None:
        """Spec of one matrix by name, the first matching override applied; None where an override says 16-bit."""
        for pattern, settings in self.overrides:
            if re.match(pattern, module):
                if settings is None:
                    return None
                known = {k: settings[k] for k in QuantSpec.__dataclass_fields__ if k in settings}
                return QuantSpec(**{**vars(self.spec), **known})
        return self.spec

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` section, in the public format's own keys plus ours under `bitshard`."""
        format_name = "gptq" if self.layout.zeros_version == 1 else "gptq_v2"
        dynamic = {("-:" if s is None else "+:") + p: s or {} for p, s in self.overrides}
        return {
            "lm_head": False,
            **self.extra,
            **vars(self.spec),
            "quant_method": "gptq",
            "checkpoint_format": format_name,
            "format": format_name,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "bitshard": dict(self.section),
        }


def parse_quant_config(section: Mapping[str, Any], where: str) -> QuantConfig:
    """The reader's half of `QuantConfig.to_json`; understands AutoGPTQ's, GPTQModel's and our own files."""
    method = section.get("quant_method", section.get("method", "gptq"))
    if method != "gptq":
        raise FormatError(where, f"quant_method {method!r}", "'gptq'", "convert the checkpoint to GPTQ first")
    names = {str(section[key]) for key in ("checkpoint_format", "format") if section.get(key)} or {"gptq"}
    if len(names) > 1 or not names <= {"gptq", "gptq_v2"}:
        raise FormatError(
            where,
            f"checkpoint_format {' and '.join(sorted(names))}, so the zero-point version is unclear",
            "'gptq' (zeros stored minus one) or 'gptq_v2' (zeros as they are)",
            "set checkpoint_format to what the quantizer wrote",
        )
    ours = section.get("bitshard", {})
    version = ours.get("version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FormatError(
            where, f"bitshard format version {version}", f"{FORMAT_VERSION} or older", "upgrade bitshard to read it"
        )
    if section.get("pack_dtype", "int32") != "int32":
        raise FormatError(where, f"pack_dtype {section['pack_dtype']!r}", "'int32'", "repack with 32-bit words")
    overrides = []
    for pattern, settings in (section.get("dynamic") or {}).items():
        overrides.append((pattern.removeprefix("+:").removeprefix("-:"), None if pattern[:2] == "-:" else settings))
    try:
        spec = QuantSpec(
            bits=section["bits"],
            group_size=section["group_size"],
            sym=section.get("sym", True),
            desc_act=section.get("desc_act", False),
            static_groups=bool(section.get("static_groups") or section.get("meta", {}).get("static_groups")),
        )
    except KeyError as missing:
        raise FormatError(
            where, f"no {missing}", "bits and group_size", "add what the quantizer was asked for"
        ) from None
    layout = GptqLayout(1 if names == {"gptq"} else 2)
    return QuantConfig(spec, layout, tuple(overrides), ours, {k: v for k, v in section.items() if k not in OUR_KEYS})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), str(error), "a readable JSON file", "get the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "no JSON object", "a JSON object", "get the file again")
    return value


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
        if not path.is_dir():
            raise CheckpointError(str(path), "no such folder", "a checkpoint folder or hub id", "check the name")
        config = _read_json(path / "config.json")
        files = _tensor_files(path)
        checkpoint = cls(path, config, files, _quantization(path, config))
        checkpoint._check_matrices()
        return checkpoint

    @property
    def arch(self) -> Architecture:
        return architecture(self.config)

    @property
    def sizes(self) -> Shapes:
        return shapes(self.arch, self.config)

    @property
    def gptq(self) -> QuantConfig:
        """The quantization config of a checkpoint that must have one."""
        if self.quantization is None:
            raise FormatError(
                str(self.path / "config.json"), "no quantization_config", "a GPTQ checkpoint",
                "quantize the model first: bitshard quantize",
            )  # fmt: skip
        return self.quantization

    def plan(self) -> TPPlan:
        """The cuts of this checkpoint, with the row-parallel matrices that keep an irregular `g_idx`."""
        uncut = TPPlan(self.arch, self.sizes, self.spec_of)
        rows = [n for i in range(self.sizes.layers) for n, linear in uncut.linears(i) if linear.role == "row"]
        return replace(uncut, gathered=frozenset(filter(self.is_irregular, rows)))

    def spec_of(self, module: str) -> QuantSpec | None:
        """Spec of one matrix; None where it stays 16-bit."""
        if self.quantization is None or f"{module}.qweight" not in self.files:
            return None
        return self.quantization.spec_of(module)

    def matrices(self) -> list[str]:
        """Names of the quantized matrices, in file order."""
        return [name.removesuffix(".qweight") for name in self.files if name.endswith(".qweight")]

    def is_irregular(self, module: str) -> bool:
        """True when the matrix's input channels are not in consecutive groups. Reads `g_idx` alone."""
        spec = self.spec_of(module)
        if spec is None or f"{module}.g_idx" not in self.files:
            return False
        g_idx = self.tensor(f"{module}.g_idx")
        return not torch.equal(g_idx.to(torch.int32), trivial_g_idx(len(g_idx), spec.group(len(g_idx))))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, mapped from their files."""
        tensors = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                path = self.files.get(name)
                if path is None:
                    raise CheckpointError(str(self.path), f"no tensor {name}", "the model's tensors", "get it again")
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, "pt"))
                tensors[name] = opened[path].get_tensor(name)
        return tensors

    def shapes(self, names: Iterable[str]) -> dict[str, list[int]]:
        """Shapes of those of the named tensors that exist; reads headers alone."""
        shapes = {}
        for name in names:
            if name in self.files:
                with safe_open(self.files[name], "pt") as file:
                    shapes[name] = file.get_slice(name).get_shape()
        return shapes

    def tensor(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def matrix_tensors(self, module: str) -> dict[str, torch.Tensor]:
        """A quantized matrix's tensors by suffix."""
        names = [f"{module}.{suffix}" for suffix in GptqLayout.suffixes if f"{module}.{suffix}" in self.files]
        return {name.rpartition(".")[2]: tensor for name, tensor in self.read(names).items()}

    def matrix_columns(self, module: str, ranges: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Slices of a quantized matrix's tensors by suffix: the output channels of `ranges`, nothing else is read.

        Ranges [start, stop) begin and end between packed words, as TPPlan makes them.
        """
        spec = self.spec_of(module)
        assert spec is not None  # callers ask for quantized matrices
        tensors = {}
        for suffix in GptqLayout.suffixes:
            name = f"{module}.{suffix}"
            if name not in self.files:
                continue
            with safe_open(self.files[name], "pt") as file:
                whole = file.get_slice(name)
                if suffix == "g_idx":
                    tensors[suffix] = whole[:]
                    continue
                bits = spec.bits if suffix == "qzeros" else WORD_BITS  # how much of a word one channel takes
                places = [slice(a * bits // WORD_BITS, b * bits // WORD_BITS) for a, b in ranges]
                tensors[suffix] = torch.cat([whole[p] if suffix == "bias" else whole[:, p] for p in places], dim=-1)
        return tensors

    def weight(self, module: str) -> QuantizedWeight:
        """A quantized matrix as a logical value, fully checked."""
        spec = self.spec_of(module)
        if spec is None:
            raise FormatError(f"{module}.qweight", "no such tensor", "a quantized matrix", "check the module's name")
        return self.gptq.layout.unpack(module, self.matrix_tensors(module), spec)

    def names_in_block(self, layer: int) -> list[str]:
        prefix = f"{self.arch.blocks}.{layer}."
        return [name for name in self.files if name.startswith(prefix)]

    def names_outside_blocks(self) -> list[str]:
        blocks = re.compile(re.escape(self.arch.blocks) + r"\.\d+\.")
        return [name for name in self.files if not blocks.match(name)]

    def fingerprint(self) -> str:
        """A hash of config, names, sizes and times: changes when the checkpoint does."""
        parts: list[Any] = [self.config]
        for path in sorted(set(self.files.values())):
            stat = path.stat()
            parts.append((path.name, stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _check_matrices(self) -> None:
        """A quantized file must name a quantization, and its blocks must all be there."""
        quantized = any(name.endswith(".qweight") for name in self.files)
        if quantized and self.quantization is None:
            raise FormatError(
                str(self.path / "config.json"),
                "qweight tensors and no quantization_config",
                "a quantization_config section or a quantize_config.json",
                "add the file that the quantizer wrote",
            )
        if self.quantization is not None and not quantized:
            raise FormatError(
                str(self.path), "a quantization_config and no qweight tensor", "GPTQ tensors", "get the files again"
            )


def _quantization(path: Path, config: Mapping[str, Any]) -> QuantConfig | None:
    inline, side = config.get("quantization_config"), path / "quantize_config.json"
    parsed = []
    if inline is not None:
        parsed.append(parse_quant_config(inline, str(path / "config.json")))
    if side.exists():
        parsed.append(parse_quant_config(_read_json(side), str(side)))
    if len(parsed) == 2 and (parsed[0].spec.bits, parsed[0].spec.group_size, parsed[0].layout) != (
        parsed[1].spec.bits, parsed[1].spec.group_size, parsed[1].layout,
    ):  # fmt: skip
        raise FormatError(
            str(side), "other bits, group_size or checkpoint_format than config.json", "the same in both",
            "correct the file that is wrong, or delete it",
        )  # fmt: skip
    return parsed[0] if parsed else None


def _tensor_files(path: Path) -> dict[str, Path]:
    index = path / INDEX
    shards = sorted(path.glob("*.safetensors"))
    if index.exists():
        weight_map = _read_json(index).get("weight_map", {})
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(str(index), f"shard {shard!r}", "names inside the folder", "do not use this file")
            if not (path / shard).is_file():
                raise CheckpointError(str(index), f"shard {shard}, which is missing", "every shard", "get the file")
        shards = sorted({path / shard for shard in weight_map.values()})
    elif not shards:
        pickles = [p.name for pattern in PICKLES for p in path.glob(pattern)]
        if pickles:
            raise CheckpointError(
                str(path / pickles[0]), "a pickle checkpoint", "safetensors; opening a pickle runs its code",
                "save it again with safe_serialization=True",
            )  # fmt: skip
        raise CheckpointError(str(path), "no .safetensors file", "a safetensors checkpoint", "check the folder")
    elif len(shards) > 1:
        raise CheckpointError(
            str(path), f"{len(shards)} shards and no {INDEX}", "one file, or an index", "get the index"
        )
    files = {name: shard for shard in shards for name in _names(shard)}
    if index.exists():
        for name, shard in weight_map.items():
            if files.get(name) != path / shard:
                raise CheckpointError(
                    str(path / shard), f"no tensor {name}, which the index promises", "what the index says",
                    "get the file again",
                )  # fmt: skip
    return files


def _names(shard: Path) -> list[str]:
    try:
        with safe_open(shard, "pt") as file:
            version = json.loads((file.metadata() or {}).get("bitshard", "{}")).get("version", FORMAT_VERSION)
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            str(shard), f"a file that is truncated or altered ({error})", "a whole safetensors file", "get it again"
        ) from None
    if version > FORMAT_VERSION:
        raise FormatError(
            str(shard),
            f"bitshard format version {version}",
            f"{FORMAT_VERSION} or older",
            "upgrade bitshard to read it",
        )
    return names


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that changes from run to run; equal content must be equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))  # the format allows trailing spaces


class Writer:
    """Writes a checkpoint folder shard by shard, resumable, never half-written under its final name.

    shards: keys of the shards in order. task: what is being done; a partial folder of the same task is resumed, one of
    another task is removed. Raises CheckpointError when `out` exists.
    """

    def __init__(self, out: Path, shards: list[str], task: Mapping[str, Any]) -> None:
        if out.exists():
            raise CheckpointError(str(out), "an existing file or folder", "a new name", "choose another or remove it")
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self._files = {key: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, key in enumerate(shards, 1)}
        state = json.dumps(task, sort_keys=True)
        state_path = self.partial / "task.json"
        if state_path.exists() and state_path.read_text() == state:
            return
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            state_path.write_text(state)
        except OSError as error:
            raise self._failure(error) from None

    def has(self, shard: str) -> bool:
        """True when an earlier run finished this shard."""
        return (self.partial / self._files[shard]).exists()

    def write(self, shard: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard under a temporary name, then rename it."""
        self.write_state(self._files[shard], tensors)

    def write_state(self, file_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Any tensors, whole or not at all, in the partial folder."""
        temporary = self.partial / (file_name + ".tmp")
        metadata = {"format": "pt", "bitshard": json.dumps({"version": FORMAT_VERSION, "layout": GptqLayout.name})}
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            _sort_metadata(temporary)
            temporary.rename(self.partial / file_name)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise self._failure(error) from None

    def finish(self, source: Path, config: Mapping[str, Any], quantization: QuantConfig) -> None:
        """Index, configs, the source's tokenizer and other small files; then the final name."""
        try:
            weight_map, total = {}, 0
            for file_name in self._files.values():
                with safe_open(self.partial / file_name, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        weight_map[name] = file_name
                total += (self.partial / file_name).stat().st_size
            section = quantization.to_json()
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_json(INDEX, index)
            self._write_json("config.json", {**config, "quantization_config": section})
            self._write_json("quantize_config.json", section)
            for path in sorted({p for pattern in SIDE_FILES for p in source.glob(pattern)}):
                if path.name not in REWRITTEN:
                    shutil.copyfile(path, self.partial / path.name)
            keep = {*self._files.values(), *REWRITTEN} | {p.name for pat in SIDE_FILES for p in source.glob(pat)}
            for path in self.partial.iterdir():
                if path.name not in keep or path.name == "task.json":
                    path.unlink()
            self.partial.rename(self.out)
        except OSError as error:
            raise self._failure(error) from None

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        (self.partial / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")

    def _failure(self, error: Exception) -> CheckpointError:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        return CheckpointError(
            str(self.partial),
            "a full disk" if full else str(error),
            "a writable folder with room for the checkpoint",
            "make room and run the same command again: finished shards are kept and reused",
        )
