"""The quantization section of a GPTQ checkpoint's config: AutoGPTQ's, GPTQModel's and our own, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitshard.errors import FormatError, SpecError
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.spec import QuantSpec

FORMATS = ("gptq", "gptq_v2")
FORMAT_KEYS = ("checkpoint_format", "format")
OUR_KEYS = (*QuantSpec.__dataclass_fields__, *FORMAT_KEYS, "quant_method", "dynamic", "bitshard")


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
                return None if settings is None else _spec({**vars(self.spec), **settings}, pattern)
        return self.spec

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` section, in the public format's own keys plus ours under `bitshard`."""
        format_name = FORMATS[self.layout.zeros_version - 1]
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


def parse_quant_config(section: Any, where: str) -> QuantConfig:
    """The reader's half of `QuantConfig.to_json`. Raises FormatError, with `where`, for anything it does not know."""
    section = _mapping(section, where, "the quantization config")
    method = section.get("quant_method", section.get("method", "gptq"))
    if method != "gptq":
        raise FormatError(where, f"quant_method {method!r}", "'gptq'", "convert the checkpoint to GPTQ first")
    ours = _mapping(section.get("bitshard") or {}, where, "bitshard")
    check_version(ours, where)
    _mapping(ours.get("provenance") or {}, where, "provenance")
    return QuantConfig(
        spec=_spec(section, where),
        layout=GptqLayout(1 if _format_name(section, where) == FORMATS[0] else 2),
        overrides=_overrides(section, where),
        section=ours,
        extra={k: v for k, v in section.items() if k not in OUR_KEYS},
    )


def check_version(ours: Any, where: str) -> None:
    """FormatError unless what bitshard wrote about a file (in a config or in safetensors metadata) is known here."""
    ours = _mapping(ours, where, "bitshard")
    version, layout = ours.get("version", FORMAT_VERSION), ours.get("layout", GptqLayout.name)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FormatError(
            where, f"bitshard format version {version!r}", f"{FORMAT_VERSION} or older", "upgrade bitshard to read it"
        )
    if layout != GptqLayout.name:
        raise FormatError(where, f"bitshard layout {layout!r}", repr(GptqLayout.name), "upgrade bitshard to read it")


def _mapping(value: Any, where: str, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(where, f"{what} = {value!r}", "a JSON object", "get the file again")
    return value


def _format_name(section: Mapping[str, Any], where: str) -> str:
    names = sorted({str(section[key]) for key in FORMAT_KEYS if section.get(key)}) or [FORMATS[0]]
    if not set(names) <= set(FORMATS):
        raise FormatError(
            where, f"checkpoint_format {' and '.join(map(repr, names))}", "'gptq' or 'gptq_v2'",
            "save the checkpoint again in the plain GPTQ format",
        )  # fmt: skip
    if len(names) > 1:
        raise FormatError(
            where,
            f"checkpoint_format {' and '.join(map(repr, names))}, so the zero-point version is unclear",
            "'gptq' (zeros stored minus one) or 'gptq_v2' (zeros as they are)",
            "set checkpoint_format to what the quantizer wrote",
        )
    return names[0]


def _overrides(section: Mapping[str, Any], where: str) -> tuple[tuple[str, dict[str, Any] | None], ...]:
    overrides: list[tuple[str, dict[str, Any] | None]] = []
    for key, settings in _mapping(section.get("dynamic") or {}, where, "dynamic").items():
        place, pattern = f"{where}, dynamic {key!r}", key.removeprefix("+:").removeprefix("-:")
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(place, f"no regular expression ({error})", "a Python pattern", "correct it") from None
        if key.startswith("-:"):
            overrides.append((pattern, None))
        else:
            settings = dict(_mapping(settings, place, "settings"))
            _spec({**section, **settings}, place)
            overrides.append((pattern, settings))
    return tuple(overrides)


def _spec(section: Mapping[str, Any], where: str) -> QuantSpec:
    """The spec that a section or an override of it asks for; keys that say nothing take the quantizers' defaults."""

    def given(key: str, default: bool) -> Any:
        return default if section.get(key) is None else section[key]

    missing = [key for key in ("bits", "group_size") if key not in section]
    if missing:
        raise FormatError(where, f"no {missing[0]}", "bits and group_size", "add what the quantizer was asked for")
    if (section.get("pack_dtype") or "int32") != "int32":
        raise FormatError(where, f"pack_dtype {section['pack_dtype']!r}", "'int32'", "repack with 32-bit words")
    static = _mapping(section.get("meta") or {}, where, "meta").get("static_groups") or False
    try:
        return QuantSpec(
            bits=section["bits"],
            group_size=section["group_size"],
            sym=given("sym", True),
            desc_act=given("desc_act", False),
            static_groups=given("static_groups", static),
        )
    except SpecError as error:
        raise FormatError(where, f"{error.where} = {error.found}", error.allowed, error.fix) from None
