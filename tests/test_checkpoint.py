"""Checkpoints that are damaged, contradict themselves or are none: each is refused by name, from the command line."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alter import (
    WEIGHTS,
    Change,
    altered,
    config,
    content,
    header,
    json_file,
    removed,
    section,
    sharded,
    steps,
    tensors,
    without,
)  # fmt: skip
from bitshard.checkpoint import INDEX, Checkpoint
from bitshard.errors import BitshardError, CheckpointError, FormatError
from bitshard.quantconfig import OUR_KEYS, parse_quant_config
from bitshard.spec import QuantSpec
from commands import bitshard, refusal
from dense import character_tokenizer
from factory import random_checkpoint

DOWN = "model.layers.1.mlp.down_proj"  # 128 x 64: 8 groups of 16
V = "model.layers.0.self_attn.v_proj"  # 64 x 32
KEYS = (*OUR_KEYS, "meta", "pack_dtype", "+:x", "-:x", "provenance", "version")
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing wrong: symmetric, act_order, version 1."""
    folder = random_checkpoint(tmp_path_factory.mktemp("whole") / "in", "llama", QuantSpec(4, 16, True, True), 0, 1)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "in"))


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def groups(*sizes: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(torch.int32)


def metadata(value: str) -> Change:
    return tensors({}, {"format": "pt", "bitshard": value})


def index(**changes: object) -> Change:
    """A sharded checkpoint whose index says something else of one tensor."""
    return steps(sharded, lambda folder: _edit_index(folder, changes))


def _edit_index(folder: Path, changes: dict[str, object]) -> None:
    value = json.loads((folder / INDEX).read_text())
    value["weight_map"] |= {f"{DOWN}.{suffix}": shard for suffix, shard in changes.items()}
    (folder / INDEX).write_text(json.dumps(value))


def awq(folder: Path) -> None:
    removed("quantize_config.json")(folder)
    config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})(folder)


UNREADABLE = "model.safetensors: found a file that cannot be read"
DAMAGED = "model.safetensors: found a file that is truncated or altered"
UNCLEAR = "so the zero-point version is unclear"
FILES: dict[str, tuple[Change, str]] = {
    "empty": (content(WEIGHTS, b""), DAMAGED),
    "no header": (altered(lambda data: data[:8]), DAMAGED),
    "half a header": (altered(lambda data: data[:2000]), DAMAGED),
    "half the data": (altered(lambda data: data[: len(data) // 2]), DAMAGED),
    "all but a byte": (altered(lambda data: data[:-1]), DAMAGED),
    "a byte too many": (altered(lambda data: data + b"\0"), DAMAGED),
    "header garbage": (altered(lambda data: data[:8] + b"\xff" * 64 + data[72:]), DAMAGED),
    "header length huge": (altered(lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), DAMAGED),
    "header length zero": (altered(lambda data: bytes(8) + data[8:]), DAMAGED),
    "header not an object": (altered(lambda data: b"\x02" + bytes(7) + b"[]"), DAMAGED),
    "offsets beyond": (header(lambda h: h[f"{DOWN}.scales"].update(data_offsets=[0, 1 << 40])), DAMAGED),
    "shape and bytes": (header(lambda h: h[f"{DOWN}.scales"].update(shape=[9, 64])), DAMAGED),
    "a folder of that name": (
        steps(removed(WEIGHTS), lambda f: (f / WEIGHTS).mkdir()),
        "tensors: found a file that cannot be read",
    ),
    "shard missing": (steps(sharded, removed(SHARD)), rf"{INDEX}: found shard '{SHARD}', which is missing"),
    "shard cut": (steps(sharded, altered(lambda data: data[:-9], SHARD)), rf"{SHARD}: found a file that is truncated"),
    "shard outside": (index(qweight="../x.safetensors"), r"index.json: found shard '\.\./x.safetensors'"),
    "shard absolute": (index(qweight="/etc/passwd"), "index.json: found shard '/etc/passwd'"),
    "shard is a folder": (index(qweight=".."), r"found shard '\.\.', which is missing"),
    "shard is a number": (index(qweight=7), "index.json: found no weight_map"),
    "index promises more": (
        index(nothing=SHARD),
        rf"{SHARD}: found no tensor {DOWN}.nothing, which the index promises",
    ),
    "index is no JSON": (steps(sharded, content(INDEX, b"{")), "index.json: found JSONDecodeError"),
    "index is a list": (steps(sharded, content(INDEX, b"[]")), "index.json: found a JSON list"),
    "index is empty": (steps(sharded, content(INDEX, b"{}")), "index.json: found no weight_map"),
    "no index": (steps(sharded, removed(INDEX)), f"in: found 3 safetensors files and no {INDEX}"),
    "pickle": (steps(removed(WEIGHTS), content("pytorch_model.bin", b"")), "pytorch_model.bin: found a pickle"),
    "pickle .pt": (steps(removed(WEIGHTS), content("model.pt", b"")), "model.pt: found a pickle checkpoint"),
    "no weights": (removed(WEIGHTS), "in: found no .safetensors file"),
    "no config": (removed("config.json"), "config.json: found no such file"),
    "config not JSON": (content("config.json", b"{'a': 1}"), "config.json: found JSONDecodeError"),
    "config not UTF-8": (content("config.json", b'{"a": "\xff"}'), "config.json: found UnicodeDecodeError"),
    "config a list": (content("config.json", b"[1]"), "config.json: found a JSON list"),
    "config too deep": (content("config.json", b'{"a":' * 100_000), "config.json: found RecursionError"),
    "side not JSON": (content("quantize_config.json", b"x"), "quantize_config.json: found JSONDecodeError"),
    "newer metadata": (metadata('{"version": 99}'), "model.safetensors: found bitshard format version 99"),
    "odd metadata": (metadata("[1]"), r"model.safetensors: found bitshard = \[1\]"),
    "metadata no JSON": (metadata("{"), "model.safetensors: found metadata that is no JSON"),
    "other layout": (metadata('{"layout": "mix64"}'), "model.safetensors: found bitshard layout 'mix64'"),
}
SIZES: dict[str, tuple[Change, str]] = {
    "no size": (config(hidden_size=None), "config.json: found hidden_size = None; allowed: a positive integer"),
    "size a string": (config(num_hidden_layers="2"), "config.json: found num_hidden_layers = '2'"),
    "size a boolean": (config(num_hidden_layers=True), "config.json: found num_hidden_layers = True"),
    "no heads": (config(num_attention_heads=0), "config.json: found num_attention_heads = 0"),
    "no KV heads": (config(num_key_value_heads=0), "config.json: found num_key_value_heads = 0"),
    "KV heads": (config(num_key_value_heads=3), "config.json: found 4 heads over 3 KV heads"),
    "architecture": (config(model_type="t5"), "config.json: found model_type 't5'"),
    "no architecture": (config(model_type=None), "config.json: found model_type None"),
    "another width": (
        config(intermediate_size=64),
        "gate_proj.qweight: found 64 x 128 channels; allowed: 64 x 64 channels, as config.json has it",
    ),
    "more layers": (config(num_hidden_layers=3), "in: model.layers.2.self_attn.q_proj.qweight: found no such tensor"),
    "fewer layers": (config(num_hidden_layers=1), "safetensors: model.layers.1.* found a tensor of block 1"),
    "no matrix": (without(f"{V}."), f"in: {V}.qweight: found no such tensor"),
    "no matrix in any block": (without("o_proj"), "in: model.layers.0.self_attn.o_proj.qweight: found no such tensor"),
    "no qweight": (tensors({f"{V}.qweight": None}), f"{V}.[a-z_]+: found no qweight beside it"),
    "no qzeros": (tensors({f"{V}.qzeros": None}), f"safetensors: {V}.qzeros: found no such tensor"),
    "no scales": (tensors({f"{V}.scales": None}), f"safetensors: {V}.scales: found no such tensor"),
    "no g_idx": (tensors({f"{V}.g_idx": None}), f"{V}.g_idx: found no such tensor, and desc_act=true"),
    "unknown tensor": (tensors({f"{V}.g_idy": ints(64)}), f"safetensors: {V}.g_idy: found an unknown tensor"),
    "both kinds": (tensors({f"{V}.weight": torch.zeros(32, 64)}), f"{V}.weight: found an unknown tensor"),
    "a bias alone": (tensors({"model.x.bias": torch.zeros(1)}), "model.x.bias: found no qweight beside it"),
    "16-bit size": (
        steps(without(f"{V}."), tensors({f"{V}.weight": torch.zeros(32, 32)})),
        rf"safetensors: {V}.weight: found shape \[32, 32\]; allowed: 64 x 32 channels",
    ),
    "qweight shape": (
        tensors({f"{V}.qweight": ints(7, 32)}),
        f"{V}.qweight: found 56 x 32 channels; allowed: 64 x 32",
    ),
    "qweight flat": (tensors({f"{V}.qweight": ints(8 * 32)}), rf"{V}.qweight: found shape \[256\]"),
    "qzeros shape": (tensors({f"{V}.qzeros": ints(4, 5)}), rf"{V}.qzeros: found shape \[4, 5\]; allowed: \[4, 4\]"),
    "scales shape": (tensors({f"{V}.scales": torch.ones(5, 32)}), rf"{V}.scales: found shape \[5, 32\]"),
    "g_idx shape": (tensors({f"{V}.g_idx": ints(63)}), rf"{V}.g_idx: found shape \[63\]; allowed: \[64\]"),
    "bias shape": (tensors({f"{V}.bias": torch.ones(64)}), rf"{V}.bias: found shape \[64\]; allowed: \[32\]"),
    "qweight dtype": (tensors({f"{V}.qweight": torch.zeros(8, 32)}), f"{V}.qweight: found dtype torch.float32"),
    "scales dtype": (tensors({f"{V}.scales": torch.ones(4, 32).double()}), f"{V}.scales: found dtype torch.float64"),
    "scales integers": (tensors({f"{V}.scales": ints(4, 32)}), f"{V}.scales: found dtype torch.int32"),
    "g_idx dtype": (tensors({f"{V}.g_idx": torch.zeros(64)}), f"{V}.g_idx: found torch.float32"),
    "scales NaN": (
        tensors({f"{DOWN}.scales": torch.full((8, 64), torch.nan)}),
        f"{DOWN}.scales: found NaN or infinite",
    ),
    "scales infinite": (
        tensors({f"{DOWN}.scales": torch.full((8, 64), torch.inf)}),
        f"{DOWN}.scales: found NaN or inf",
    ),
    "bias NaN": (tensors({f"{V}.bias": torch.full((32,), torch.nan)}), f"{V}.bias: found NaN or infinite"),
    "group too high": (tensors({f"{DOWN}.g_idx": groups(*[16] * 8) + 1}), f"{DOWN}.g_idx: found groups 1 to 8"),
    "group negative": (tensors({f"{DOWN}.g_idx": groups(*[16] * 8) - 1}), f"{DOWN}.g_idx: found groups -1 to 6"),
    "groups unequal": (
        tensors({f"{DOWN}.g_idx": groups(15, 17, *[16] * 6)}),
        f"safetensors: {DOWN}.g_idx: found groups of 15 to 17 channels; allowed: 8 groups of 16",
    ),
}
CONFIGS: dict[str, tuple[Change, str]] = {
    "awq": (awq, "config.json: found quant_method 'awq'"),
    "no method known": (section(quant_method="x"), "config.json: found quant_method 'x'"),
    "no section": (
        steps(removed("quantize_config.json"), config(quantization_config=None)),
        "config.json: found qweight tensors and no quantization_config",
    ),
    "no qweight": (without("_proj."), "in: found a quantization_config and no qweight tensor"),
    "section a list": (config(quantization_config=[1]), r"config.json: found the quantization config = \[1\]"),
    "bits": (section(bits=5), "config.json: found bits = 5; allowed: 2, 3, 4 or 8"),
    "bits a float": (section(bits=4.0), "config.json: found bits = 4.0"),
    "bits a string": (section(bits="4"), "config.json: found bits = '4'"),
    "other bits": (section(bits=8), "q_proj.qweight: found 32 x 64 channels; allowed: 64 x 64 channels"),
    "no bits": (section(bits=None), "config.json: found no bits"),
    "no group_size": (section(group_size=None), "config.json: found no group_size"),
    "group_size 0": (section(group_size=0), "config.json: found group_size = 0"),
    "group_size a string": (section(group_size="16"), "config.json: found group_size = '16'"),
    "other group_size": (section(group_size=32), r"q_proj.qzeros: found shape \[4, 8\]; allowed: \[2, 8\]"),
    "sym a string": (section(sym="false"), "config.json: found sym = 'false'"),
    "desc_act a number": (section(desc_act=2), "config.json: found desc_act = 2"),
    "meta a list": (section(meta=[1]), r"config.json: found meta = \[1\]"),
    "pack_dtype": (section(pack_dtype="int16"), "config.json: found pack_dtype 'int16'"),
    "marlin": (section(format="marlin", checkpoint_format=None), "config.json: found checkpoint_format 'marlin'"),
    "keys disagree": (section(format="gptq", checkpoint_format="gptq_v2"), f"'gptq' and 'gptq_v2', {UNCLEAR}"),
    "files disagree on version": (
        json_file("quantize_config.json", {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}),
        "quantize_config.json: found zero-point version by checkpoint_format 2, and 1 in config.json",
    ),
    "files disagree on bits": (json_file("quantize_config.json", {"bits": 8}), "found bits 8, and 4 in config.json"),
    "files disagree on dynamic": (json_file("quantize_config.json", {"dynamic": {"-:x": {}}}), "found dynamic"),
    "version 1 declared 2": (
        section(format="gptq_v2", checkpoint_format="gptq_v2"),
        "qzeros: found sym=true with zeros that are right only in version 1, declared as version 2",
    ),
    "newer": (section(bitshard={"version": 99}), "config.json: found bitshard format version 99; allowed: 1 or older"),
    "odd version": (section(bitshard={"version": "1"}), "config.json: found bitshard format version '1'"),
    "odd section": (section(bitshard=[1]), r"config.json: found bitshard = \[1\]"),
    "odd provenance": (section(bitshard={"provenance": [1]}), r"config.json: found provenance = \[1\]"),
    "dynamic a list": (section(dynamic=["x"]), r"config.json: found dynamic = \['x'\]"),
    "dynamic pattern": (section(dynamic={"+:(": {}}), r"config.json, dynamic '\+:\(': found no regular expression"),
    "dynamic settings": (section(dynamic={"x": 4}), "config.json, dynamic 'x': found settings = 4"),
    "dynamic bits": (section(dynamic={"x": {"bits": 5}}), "config.json, dynamic 'x': found bits = 5"),
    "dynamic excludes": (section(dynamic={"-:.*v_proj": {}}), f"{V}.qweight: found a quantized matrix that"),
}


@pytest.mark.parametrize("case", [*FILES.items(), *SIZES.items(), *CONFIGS.items()], ids=lambda case: case[0])
def test_is_refused_by_name(case: tuple[str, tuple[Change, str]], folder: Path, tmp_path: Path) -> None:
    """Before any work: not even the partial folder is begun."""
    change, sentence = case[1]
    change(folder)
    found = refusal("convert", folder, tmp_path / "out", "--json")
    assert re.search(sentence, found), found
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_version_2_declared_as_1(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "in", "llama", QuantSpec(4, 16, True, True), zeros_version=2)
    section(format=None, checkpoint_format=None)(folder)  # nothing said is version 1
    assert "right only in version 2, declared as version 1" in refusal("verify", folder)


def test_one_file_of_two_says_nothing_of_a_version_that_the_other_needs(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "in", "llama", QuantSpec(4, 16, True, True), zeros_version=2)
    json_file("quantize_config.json", {"format": None, "checkpoint_format": None})(folder)
    assert "zero-point version by checkpoint_format 1, and 2 in config.json" in refusal("inspect", folder)


@pytest.mark.parametrize("verb", ["convert", "inspect", "verify"])
def test_a_16_bit_model_is_no_gptq_checkpoint(verb: str, folder: Path, tmp_path: Path) -> None:
    steps(removed("quantize_config.json"), config(quantization_config=None), without("_proj."))(folder)
    sentence = refusal(verb, folder, *([tmp_path / "out"] if verb == "convert" else []))
    assert "config.json: found no quantization_config" in sentence and "bitshard quantize" in sentence


@pytest.mark.parametrize("verb", ["convert", "inspect", "verify", "plan", "generate", "eval"])
def test_every_verb_refuses(verb: str, folder: Path, tmp_path: Path) -> None:
    rest = {"convert": [tmp_path / "out"], "generate": ["Hello"], "eval": ["--text", __file__]}.get(verb, [])
    without(f"{V}.")(folder)
    assert f"{V}.qweight: found no such tensor" in refusal(verb, folder, *rest)
    removed("config.json")(folder)
    assert "config.json: found no such file" in refusal(verb, folder, *rest)
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    assert "in: found a file; allowed: a folder" in refusal(verb, folder, *rest)


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_groups_are_checked_where_only_they_are_read(verb: str, folder: Path) -> None:
    tensors({f"{DOWN}.g_idx": groups(15, 17, *[16] * 6)})(folder)
    assert f"{DOWN}.g_idx: found groups of 15 to 17 channels" in refusal(verb, folder)


@pytest.mark.parametrize("verb", ["inspect", "verify", "generate"])
def test_values_are_checked_where_codes_are_used(verb: str, folder: Path) -> None:
    """inspect reads headers and groups; what runs or checks a model looks at every scale."""
    tensors({f"{DOWN}.scales": torch.full((8, 64), torch.nan)})(folder)
    if verb == "inspect":
        assert bitshard(verb, folder).code == 0
    else:
        assert f"{DOWN}.scales: found NaN" in refusal(verb, folder, *(["Hello"] if verb == "generate" else []))


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.norm.weight", "lm_head.weight"])
def test_verify_checks_what_is_not_quantized(name: str, folder: Path) -> None:
    tensors({name: Checkpoint.open(folder).tensor(name).clone().fill_(torch.inf)})(folder)
    assert f"in: {name}: found NaN or infinite values" in refusal("verify", folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("layers.1.input_layernorm"), "in: found no tensor model.layers.1.input_layernorm.weight"),
        (tensors({"model.norm.weight": torch.ones(63)}), "in: found model.norm.weight of shape [63], not [64]"),
        (config(model_type="llama4"), "config.json: found model_type 'llama4'"),
        (config(hidden_act="nope"), "config.json: found KeyError: 'nope'"),
        (config(pad_token_id=1000), "config.json: found AssertionError: Padding_idx"),
    ],
)
def test_what_is_missing_is_not_filled_at_random(change: Change, sentence: str, folder: Path) -> None:
    change(folder)
    assert sentence in refusal("generate", folder, "Hello")


def test_a_broken_tokenizer_or_text_is_named(folder: Path, tmp_path: Path) -> None:
    content("tokenizer.json", b"{}")(folder)
    assert "in: found no usable tokenizer" in refusal("generate", folder, "Hello")
    removed("tokenizer.json")(folder)
    assert "in: found no usable tokenizer" in refusal("generate", folder, "Hello")
    content("text", b"\xff")(tmp_path)
    assert "text: found UnicodeDecodeError" in refusal("eval", folder, "--text", tmp_path / "text")
    assert "nothing: found No such file" in refusal("eval", folder, "--text", tmp_path / "nothing")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root reads everything, so root becomes somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_unreadable_folder_or_file(whole: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        place = Path(name)
        place.chmod(0o755)
        folder = Path(shutil.copytree(whole, place / "in"))
        (folder / WEIGHTS).chmod(0)
        with unprivileged(), pytest.raises(CheckpointError, match=rf"{WEIGHTS}: found a file that cannot be read"):
            Checkpoint.open(folder)
        (folder / "config.json").chmod(0)
        with unprivileged(), pytest.raises(CheckpointError, match="config.json: found Permission denied"):
            Checkpoint.open(folder)
        folder.chmod(0)
        with unprivileged(), pytest.raises(CheckpointError, match="in: found Permission denied"):
            Checkpoint.open(folder)


def test_a_file_that_goes_away_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    removed(WEIGHTS)(folder)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: found a file that cannot be read"):
        checkpoint.weight(V)
    with pytest.raises(CheckpointError, match="found no tensor nothing"):
        checkpoint.tensor("nothing")
    with pytest.raises(FormatError, match="lm_head.qweight: found no such tensor"):
        checkpoint.weight("lm_head")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, torch.Tensor]]:
    """One block with biases: its folder, the bytes of its weights, and what they stand for."""
    spec = QuantSpec(4, 16, False, True)
    folder = random_checkpoint(tmp_path_factory.mktemp("tiny") / "in", "qwen2", spec, num_hidden_layers=1)
    return folder, (folder / WEIGHTS).read_bytes(), meaning(folder)


def meaning(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    checkpoint.plan()
    weights = {name: checkpoint.weight(name) for name in checkpoint.matrices()}
    biases = {f"{name}.bias": weight.bias_N for name, weight in weights.items() if weight.bias_N is not None}
    return {name: weight.dequantize() for name, weight in weights.items()} | biases


Tiny = tuple[Path, bytes, dict[str, torch.Tensor]]


def assert_refused_or_the_same(tiny: Tiny, data: bytes) -> None:
    folder, _, expected = tiny
    (folder / WEIGHTS).write_bytes(data)
    try:
        found = meaning(folder)
    except BitshardError as error:
        assert error.where and error.found and error.allowed and error.fix
    else:
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_header_byte_is_refused_or_harmless(tiny: Tiny, data: st.DataObject) -> None:
    whole = bytearray(tiny[1])
    end = 8 + int.from_bytes(whole[:8], "little")
    whole[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    assert_refused_or_the_same(tiny, bytes(whole))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(["config.json", "quantize_config.json"]))
def test_a_flipped_config_byte_is_refused_or_harmless(tiny: Tiny, data: st.DataObject, name: str) -> None:
    folder, weights, _ = tiny
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(flipped)
    try:
        assert_refused_or_the_same(tiny, weights)
    finally:
        (folder / name).write_bytes(whole)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_length_is_refused(tiny: Tiny, data: st.DataObject) -> None:
    folder, whole, _ = tiny
    (folder / WEIGHTS).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=DAMAGED):
        meaning(folder)


@settings(max_examples=100, deadline=None)
@given(section=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner),
    max_leaves=8,
))  # fmt: skip
def test_any_json_is_a_config_or_a_format_error(section: object) -> None:
    good = {"bits": 4, "group_size": 16}
    for value in (section, good | {"dynamic": section}, good | {"bitshard": section}):
        try:
            parse_quant_config(value, "config.json")
        except FormatError as error:
            assert "config.json" in error.where


def test_an_unfinished_run_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "task.json").write_text("{}")
    with pytest.raises(CheckpointError, match="out.partial: found an unfinished run; .* give its command again"):
        Checkpoint.open(tmp_path / "out.partial")
