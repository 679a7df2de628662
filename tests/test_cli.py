"""The command line: help, JSON, tables, exit codes, and nothing but results on stdout."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alter import WEIGHTS, Change, config, merged, section, tensors
from bitshard import __version__, cli, generate
from bitshard.convert import convert
from bitshard.kernels import BACKENDS
from bitshard.quantized import trivial_g_idx
from bitshard.spec import QuantSpec
from bitshard.writer import Writer
from commands import SENTENCE, Result, bitshard, refusal
from dense import character_tokenizer, random_model, random_text
from factory import random_checkpoint

VERBS = ("quantize", "convert", "plan", "inspect", "verify", "eval", "generate", "doctor", "demo", "bench", "bench mlp")
WIDTH = 80
SMALL = ("--samples", 2, "--length", 32)
DOWN, NORM = "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gptq and its conversion tp, a 16-bit model and a text, in a folder whose name would be markup to rich."""
    place = tmp_path_factory.mktemp("cli") / "[red]a[/x] :smile:"
    place.mkdir(parents=True)
    random_checkpoint(place / "gptq", "llama", QuantSpec(4, 16, False, True))
    character_tokenizer().save_pretrained(place / "gptq")
    convert(place / "gptq", place / "tp")
    random_model(place / "dense", "llama")
    (place / "text.txt").write_text(random_text(800))
    (place / "group_size.txt").write_text(random_text(11))
    return place


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """A copy of gptq to be changed."""
    return Path(shutil.copytree(place / "gptq", tmp_path / "gptq"))


def commands(place: Path, tmp_path: Path) -> dict[str, list[object]]:
    """Each verb once, on tiny files."""
    text, tp = place / "text.txt", place / "tp"
    return {
        "quantize": [place / "dense", tmp_path / "q", "--calibration", text, *SMALL],
        "convert": [place / "gptq", tmp_path / "out"],
        "plan": [place / "gptq", "--pad", 8, "--gb-per-s", 100],
        "inspect": [tp],
        "verify": [tp, "--against", place / "gptq"],
        "eval": [tp, "--text", text, "--context", 32, "--windows", 2],
        "generate": [tp, "Hello", "--max-new-tokens", 4],
        "doctor": [],
    }  # fmt: skip


def success(*arguments: object) -> Result:
    result = bitshard(*arguments)
    assert result.code == 0, result.stderr
    return result


def test_the_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "bitshard", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "quantize" in result.stdout and not result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    text = success(*verb.split(), "--help").stdout
    assert text.lstrip().startswith("Usage: ") and "--help" in text
    assert max(map(len, text.splitlines())) <= WIDTH
    if verb not in ("bench", "bench mlp"):
        assert "--json" in text


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_help_names_every_backend(verb: str) -> None:
    assert ("exact", "auto", *cli.KERNELS) == BACKENDS
    words = success(verb, "--help").stdout.replace("│", " ").split()
    assert f"or a kernel: {', '.join(cli.KERNELS)}." in " ".join(words)


def test_help_of_all() -> None:
    text = " ".join(success("--help").stdout.split())
    assert "Exit codes: 0 done, 1 refused, failed or" in text
    assert all(verb.split()[0] in text for verb in VERBS)


def test_help_says_what_is_taken_by_default() -> None:
    """Nothing of it is taken for markup."""
    text = " ".join(success("quantize", "--help").stdout.replace("│", " ").split())
    for default in (
        "mix64 2, gptq 4",
        "mix64 0.05, gptq 0.01",
        "hessian",
        "2.91",
        "wiki text of the package exllamav3",
    ):
        assert f"(default: {default})." in text


@pytest.mark.parametrize("verb", ["quantize", "convert", "plan", "inspect", "verify", "eval", "generate", "doctor"])
def test_json_and_tables(verb: str, place: Path, tmp_path: Path) -> None:
    arguments = commands(place, tmp_path)[verb]
    value: Any = json.loads(success(verb, *arguments, "--json").stdout)
    assert value and isinstance(value, list if verb == "doctor" else dict)
    if verb in ("quantize", "convert"):
        shutil.rmtree(arguments[1])
    table = success(verb, *arguments).stdout
    assert table and "\x1b" not in table and "[bold]" not in table
    cells = [line for line in table.splitlines() if "  " in line]  # a sentence is not cut, so that it can be copied
    assert max(map(len, cells), default=0) <= WIDTH


def test_names_are_no_markup(place: Path, tmp_path: Path) -> None:
    assert str(place) in success("convert", place / "gptq", tmp_path / "[bold]").stdout
    assert (tmp_path / "[bold]").is_dir()
    assert "[/x] :smile:" in success("inspect", place / "gptq").stdout.replace("\n", "")


def test_json_says_what_was_found(place: Path) -> None:
    found = json.loads(success("inspect", place / "gptq", "--json").stdout)
    assert found["spec"] == {"bits": 4, "group_size": 16, "sym": False, "desc_act": True, "static_groups": False}
    assert len(found["matrices"]) == 14 and {m["order"] for m in found["matrices"]} == {"by g_idx"}
    assert found["zeros_version"] == 2 and found["degrees"] and found["provenance"] == {}
    found = json.loads(success("verify", place / "tp", "--against", place / "gptq", "--json").stdout)
    assert found["equal_matrices"] == found["matrices"] > 14 and found["logits_error"] < 1e-4
    degrees = json.loads(success("plan", place / "gptq", "--json").stdout)["degrees"]
    assert [d["tp_size"] for d in degrees if not d["obstacles"]] == json.loads(
        success("inspect", place / "gptq", "--json").stdout
    )["degrees"]


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["convert"], ["convert", "in"], ["convert", "in", "out", "more"], ["inspect", "in", "--layer"],
        ["plan", "in", "--bits", "four"], ["generate", "in", "x", "--tp", "0"], ["generate", "in", "x", "--seed", "-1"],
        ["eval", "in"], ["bench", "mlp", "--ranks", "1,x"], ["verify", "in", "--against"],
    ],
)  # fmt: skip
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    result = bitshard(*arguments)
    assert result.code == 2 and "Traceback" not in result.stderr
    assert not result.stdout or not arguments  # without a verb there is help


def failures(place: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    gptq, dense, text, out = place / "gptq", place / "dense", place / "text.txt", tmp_path / "out"
    ask = ["generate", gptq, "Hello"]
    predict = ["eval", gptq, "--text", text, "--context"]
    calibrate = ["quantize", dense, out, "--calibration", text, *SMALL]
    return {
        "no folder": (["inspect", "/nothing/at/all"], "/nothing/at/all: found no such folder"),
        "no hub id": (["inspect", ""], ": found "),
        "out exists": (["convert", gptq, gptq], "gptq: found an existing file or folder"),
        "pad to 0": (["convert", gptq, out, "--pad-to", 0], "tensor-parallel degree: found 0; allowed: 1 to 64"),
        "pad to -1": (["plan", gptq, "--pad", -1], "tensor-parallel degree: found -1"),
        "max tp": ([*calibrate, "--max-tp", 0], "tensor-parallel degree: found 0"),
        "no bandwidth": (["plan", gptq, "--gb-per-s", 0], "--gb-per-s: found 0"),
        "bits": (["plan", dense, "--bits", 5], "--bits: found 5; allowed: 2, 3, 4 or 8"),
        "group size": (["plan", dense, "--group-size", 0], "--group-size: found 0"),
        "format": ([*calibrate, "--format", "awq"], "--format: found 'awq'; allowed: mix64 or gptq"),
        "option of gptq": ([*calibrate, "--group-size", 64], "--group-size: found 64; allowed: the options of"),
        "option of mix64": ([*calibrate, "--format", "gptq", "--ranges", "search"], "ranges: found 'search'"),
        "ordered twice": (
            [*calibrate, "--format", "gptq", "--group-size", 16, "--order", "model", "--desc-act"],
            "--desc-act: found true with order model",
        ),
        "recipe": ([*calibrate, "--recipe", "paper-v9"], "recipe: found 'paper-v9'; allowed: paper-v1 or paper-v4"),
        "recipe and more": ([*calibrate, "--recipe", "paper-v4", "--bits", 3], "recipe: found paper-v4 with bits"),
        "fraction": ([*calibrate, "--fraction-4bit", 0.3], "--fraction-4bit: found 0.3; allowed: 0, 0.25, 0.5 or 1"),
        "outliers": ([*calibrate, "--outliers", 0.5], "outliers: found 0.5"),
        "odd size": ([*calibrate, "--format", "gptq", "--group-size", 48], "q_proj: found 64 input channels"),
        "short calibration": (["quantize", dense, out, "--calibration", text], "--length: found 512 tokens"),
        "quantized twice": (["quantize", gptq, out, "--calibration", text], "gptq: found a quantized checkpoint"),
        "degree": (["generate", place / "tp", "Hello", "--tp", 3], "o_proj: found tensor-parallel degree 3"),
        "strategy": ([*ask, "--strategy", "best"], "strategy: found 'best'"),
        "not converted": ([*ask, "--tp", 2], "down_proj: found an irregular g_idx"),
        "temperature": ([*ask, "--temperature", -1], "temperature: found -1"),
        "temperature NaN": ([*ask, "--temperature", "nan"], "temperature: found nan"),
        "temperature of nothing": ([*ask, "--temperature", "1e-40"], "temperature: found 1e-40; allowed: 0, or 1e-06"),
        "words of an option in a path": (
            ["eval", gptq, "--text", place / "group_size.txt", "--context", 64],
            "group_size.txt: found 11 tokens",
        ),
        "words of an option in a prompt": (["generate", gptq, "my group_size \udce9"], "found 'my group_size"),
        "prompt in bytes": (["generate", gptq, "\udce9"], r"prompt: found '\udce9'; allowed: UTF-8 text"),
        "no new tokens": ([*ask, "--max-new-tokens", 0], "--max-new-tokens: found 0"),
        "too many tokens": ([*ask, "--max-new-tokens", 500], "--max-new-tokens: found 505 tokens in all; allowed: 128"),
        "no prompt": (["generate", gptq, ""], "text: found no tokens"),
        "context": ([*predict, 1], "context: found 1"),
        "long context": ([*predict, 256], "--context: found 256 tokens in all; allowed: 128"),
        "short text": ([*predict, 64, "--windows", 99], "text.txt: found 800 tokens, 12 windows of 64"),
        "no windows": ([*predict, 64, "--windows", 0], "--windows: found 0"),
        "too many windows": ([*predict, 64, "--windows", 99], "text.txt: found 800 tokens"),
        "no text": (["eval", gptq, "--text", out], "out: found No such file"),
        "another source": (["verify", gptq, "--against", dense], "config.json: found no quantization_config"),
        "not converted from": (["verify", gptq, "--against", gptq], "found other weights than the source's"),
    }  # fmt: skip


FAILURES = tuple(failures(Path(), Path()))


@pytest.mark.parametrize("case", FAILURES)
def test_a_mistake_is_one_sentence(case: str, place: Path, tmp_path: Path) -> None:
    arguments, sentence = failures(place, tmp_path)[case]
    assert sentence in refusal(*arguments)
    assert not list(tmp_path.iterdir())


def test_another_models_tokenizer(copy: Path) -> None:
    tensors({name: torch.zeros(64, 64).half() for name in ("model.embed_tokens.weight", "lm_head.weight")})(copy)
    config(vocab_size=64)(copy)
    assert "tokenizer.json: found token 80; allowed: 0 to 63" in refusal("generate", copy, "Hello")


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template(template: str, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(template)
    assert "gptq: found a chat template that fails (Template" in refusal("generate", copy, "Hello")
    assert success("generate", copy, "Hello", "--max-new-tokens", 2, "--no-chat")


def test_a_model_that_predicts_nothing(copy: Path, place: Path) -> None:
    tensors({"model.norm.weight": torch.full((64,), torch.nan)})(copy)
    assert "gptq: found a mean loss of nan" in refusal("eval", copy, "--text", place / "text.txt", "--context", "32")


def flipped(name: str, bit: int) -> Change:
    def change(folder: Path) -> None:
        words = load_file(folder / WEIGHTS)[name]
        words[3, 5] ^= 1 << bit
        tensors({name: words})(folder)

    return change


OTHER = "found other weights than the source's"
DIFFERENCES: dict[str, tuple[Change, str]] = {
    "one bit": (flipped(f"{DOWN}.qweight", 9), f"tp: {DOWN}: {OTHER}"),
    "one zero": (flipped(f"{DOWN}.qzeros", 0), f"tp: {DOWN}: {OTHER}"),
    "an order": (tensors({f"{DOWN}.g_idx": trivial_g_idx(128, 16).flip(0)}), f"tp: {DOWN}: {OTHER}"),
    "the version": (section(format="gptq", checkpoint_format="gptq"), f"_proj: {OTHER}"),
    "a norm": (tensors({f"{NORM}.weight": torch.full((64,), 1.01).half()}), f"tp: {NORM}: {OTHER}"),
    "the head": (tensors({"lm_head.weight": torch.ones(96, 64).half()}), "tp: lm_head.weight: found another tensor"),
    "no norm": (tensors({f"{NORM}.weight": None}), f"tp: found no tensor {NORM}.weight, which"),
    "more": (tensors({"model.layers.0.x": torch.ones(1)}), "gptq: found no tensor model.layers.0.x, which"),
    "sizes": (
        config(head_dim=8, num_attention_heads=8, num_key_value_heads=4),
        "found another model than the source's",
    ),
    "what no tensor says": (config(rms_norm_eps=0.1), "tp: found logits off by"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_verify_sees(difference: str, place: Path, tmp_path: Path) -> None:
    change, sentence = DIFFERENCES[difference]
    out = Path(shutil.copytree(place / "tp", tmp_path / "tp"))
    merged(out)
    assert bitshard("verify", out, "--against", place / "gptq").code == 0
    change(out)
    assert sentence in refusal("verify", out, "--against", place / "gptq")


def test_ctrl_c(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", interrupted)
    result = bitshard("convert", copy, tmp_path / "out")
    assert result.code == 1 and not result.stdout
    assert result.stderr.splitlines()[-1].startswith("bitshard: interrupted; what was finished is kept")


def test_an_empty_answer_is_explained(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args: replace(found(*args), text="\n"))
    result = bitshard("generate", copy, "Hello", "--max-new-tokens", 2, "--no-chat", "--json")
    assert result.code == 0 and "the model ended its answer at once: ask otherwise" in result.stderr


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_no_room_for_the_result(options: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bitshard", "doctor", *options]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and SENTENCE.fullmatch(done.stderr.rstrip("\n")), done.stderr
    assert "stdout: found No space left on device, when all work was done" in done.stderr


def test_the_version() -> None:
    assert success("--version").stdout.strip() == __version__


def test_progress_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines with time left, not one bar when all is done; a log of a night must show how far it is."""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    assert list(cli._lines("abcdef", "quantizing")) == list("abcdef")
    assert capsys.readouterr().err.splitlines() == [
        "quantizing 1/6 0:00:40 left 0:03:20", "quantizing 3/6 0:01:20 left 0:01:20",
        "quantizing 5/6 0:02:00 left 0:00:24", "quantizing 6/6 0:02:20",
    ]  # fmt: skip
