"""The quantization section of a checkpoint's config: AutoGPTQ's, GPTQModel's and our own, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitshard.errors import FormatError, SpecError
from bitshard.layout import FORMAT_VERSION, GptqLayout, Layout, Mix64Layout
from bitshard.spec import MixSpec, QuantSpec

FORMATS = ("gptq", "gptq_v2")
FORMAT_KEYS = ("checkpoint_format", "format")
LAYOUTS = (GptqLayout, Mix64Layout)
OUR_KEYS = {"quant_method", "dynamic", "bitshard"}


@dataclass(frozen=True)
class QuantConfig:
    """The quantization section of a checkpoint: one layout, and the spec of every matrix that no override matches.

    overrides: GPTQModel's `dynamic`, pattern -> settings or None.
    """

    spec: QuantSpec | MixSpec
    layout: Layout
    overrides: tuple[tuple[str, dict[str, Any] | None], ...] = ()
    section: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # other keys of the file, kept as they are

    def spec_of(self, module: str) -> QuantSpec | MixSpec | None:
        """Spec of one matrix by name, the first matching override applied; None where an override says 16-bit."""
        for pattern, settings in self.overrides:
            if re.match(pattern, module):
                return None if settings is None else _spec(self.layout.name, {**vars(self.spec), **settings}, pattern)
        return self.spec

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` section, in the public format's own keys plus ours under `bitshard`."""
        dynamic = {("-:" if s is None else "+:") + p: s or {} for p, s in self.overrides}
        public: dict[str, Any] = {}
        if isinstance(self.layout, GptqLayout):
            format_name = FORMATS[self.layout.zeros_version - 1]
            public = {"checkpoint_format": format_name, "format": format_name, "pack_dtype": "int32"}
        return {
            "lm_head": False,
            **self.extra,
            **vars(self.spec),
            "quant_method": self.layout.method,
            **public,
            **({"dynamic": dynamic} if dynamic else {}),
            "bitshard": dict(self.section),
        }


def parse_quant_config(section: Any, where: str) -> QuantConfig:
    """The reader's half of `QuantConfig.to_json`. Raises FormatError, with `where`, for anything it does not know."""
    section = _mapping(section, where, "the quantization config")
    method = section.get("quant_method", section.get("method", "gptq"))
    ours = _mapping(section.get("bitshard") or {}, where, "bitshard")
    layout = check_version(ours, where)
    if method not in [known.method for known in LAYOUTS]:
        fix = "take the checkpoint that it was exported from, or one in GPTQ's format"
        raise FormatError(where, f"quant_method {method!r}", "'bitshard' or 'gptq'", fix)
    if method != layout.method:
        raise FormatError(
            where, f"quant_method {method!r} with layout {layout.name!r}", repr(layout.method), "get the file again"
        )
    _mapping(ours.get("provenance") or {}, where, "provenance")
    spec = _spec(layout.name, section, where)
    keys = OUR_KEYS | vars(spec).keys() | set(FORMAT_KEYS if layout is GptqLayout else ())
    return QuantConfig(
        spec=spec,
        layout=_gptq_layout(section, where) if layout is GptqLayout else Mix64Layout(),
        overrides=_overrides(layout.name, section, where),
        section=ours,
        extra={k: v for k, v in section.items() if k not in keys},
    )


def check_version(ours: Any, where: str) -> type[GptqLayout] | type[Mix64Layout]:
    """The layout that bitshard says a file has, in a config or in safetensors metadata; FormatError if unknown here."""
    ours = _mapping(ours, where, "bitshard")
    version, name = ours.get("version", FORMAT_VERSION), ours.get("layout", GptqLayout.name)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FormatError(
            where, f"bitshard format version {version!r}", f"{FORMAT_VERSION} or older", "upgrade bitshard to read it"
        )
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    names = " or ".join(repr(layout.name) for layout in LAYOUTS)
    raise FormatError(where, f"bitshard layout {name!r}", names, "upgrade bitshard to read it")


def _mapping(value: Any, where: str, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(where, f"{what} = {value!r}", "a JSON object", "get the file again")
    return value


def _gptq_layout(section: Mapping[str, Any], where: str) -> GptqLayout:
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
    return GptqLayout(1 if names[0] == FORMATS[0] else 2)


def _overrides(layout: str, section: Mapping[str, Any], where: str) -> tuple[tuple[str, dict[str, Any] | None], ...]:
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
            _spec(layout, {**section, **settings}, place)
            overrides.append((pattern, settings))
    return tuple(overrides)


def _spec(layout: str, section: Mapping[str, Any], where: str) -> QuantSpec | MixSpec:
    """The spec that a section or an override of it asks for."""
    required = ("bits", "group_size") if layout == GptqLayout.name else tuple(MixSpec.__dataclass_fields__)
    missing = [key for key in required if key not in section]
    if missing:
        raise FormatError(where, f"no {missing[0]}", " and ".join(required), "add what the quantizer was asked for")
    try:
        if layout == Mix64Layout.name:
            return MixSpec(**{key: section[key] for key in required})
        return _gptq_spec(section, where)
    except SpecError as error:
        raise FormatError(where, f"{error.where} = {error.found}", error.allowed, error.fix) from None


def _gptq_spec(section: Mapping[str, Any], where: str) -> QuantSpec:
    """Keys that say nothing take the quantizers' defaults."""

    def given(key: str, default: bool) -> Any:
        return default if section.get(key) is None else section[key]

    if (section.get("pack_dtype") or "int32") != "int32":
        raise FormatError(where, f"pack_dtype {section['pack_dtype']!r}", "'int32'", "repack with 32-bit words")
    static = _mapping(section.get("meta") or {}, where, "meta").get("static_groups") or False
    return QuantSpec(
        bits=section["bits"],
        group_size=section["group_size"],
        sym=given("sym", True),
        desc_act=given("desc_act", False),
        static_groups=given("static_groups", static),
    )
