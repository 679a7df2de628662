"""Perplexity, divergence and tasks, held against the same numbers computed in another way."""

import json
import math
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from bitshard import evaluate as module
from bitshard.errors import BitshardError, CheckpointError, SpecError
from bitshard.evaluate import (
    TaskOptions,
    TextOptions,
    Windows,
    evaluate,
    load_tasks,
    perplexity,
    task_scores,
    text_windows,
)
from bitshard.integrations.transformers import load
from bitshard.sources import load_tokenizer
from bitshard.spec import QuantSpec
from commands import bitshard, refusal
from dense import character_tokenizer, framing_tokenizer, random_model, random_text
from factory import ASSETS, random_checkpoint, rewrite

TASKS = Path(__file__).parents[1] / "benchmarks" / "tasks"
needs_lm_eval = pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed: pip install '.[eval]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one vocabulary, a quantized one, and a text of 800 tokens, which are characters."""
    place = tmp_path_factory.mktemp("evaluate")
    random_model(place / "one", "llama", seed=1)
    random_model(place / "two", "llama", seed=2)
    random_checkpoint(place / "gptq", "llama", QuantSpec(4, 16, False, True))
    tokenizer = character_tokenizer()
    tokenizer.eos_token = "~"  # lm-eval wants one
    for name in ("one", "two", "gptq"):
        tokenizer.save_pretrained(place / name)
    (place / "text.txt").write_text(random_text(800))
    return place


def bos_tokenizer() -> Any:
    """One that puts token 0 before a text, as Gemma's puts <bos>."""
    tokenizer = character_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    return tokenizer


def log_probabilities(model: Any, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [windows, scored, vocabulary], and the tokens they are for: all windows at once, all positions."""
    batch = torch.cat([windows[i] for i in range(len(windows))])
    with torch.no_grad():
        logs = model(batch).logits.double().log_softmax(-1)
    return logs[:, :-1][:, -windows.scored :], batch[:, -windows.scored :]


@pytest.mark.parametrize("tokenizer", [character_tokenizer, bos_tokenizer, framing_tokenizer])
@pytest.mark.parametrize("stride", [None, 24, 23, 7, 1])
def test_every_token_is_scored_once(stride: int | None, tokenizer: Any) -> None:
    text = random_text(100)
    ids = character_tokenizer()(text)["input_ids"]
    windows = text_windows(tokenizer(), text, 24, stride)
    before = {bos_tokenizer: [0], framing_tokenizer: [1, 2]}.get(tokenizer, [])
    first = len(before)
    step = min(stride or 24, 24 - first)
    for i in range(len(windows)):
        assert windows[i].tolist() == [before + ids[i * step : i * step + 24 - first]]
    assert len(windows) * step + 24 - first > 100  # one more would not fit
    scored = [i * step + 24 - first - windows.scored + j for i in range(len(windows)) for j in range(windows.scored)]
    assert len(set(scored)) == len(scored)
    if stride not in (None, 24) or first:  # disjoint windows without a first token leave each one's first unscored
        assert scored == list(range(scored[0], scored[0] + len(scored)))
    assert len(text_windows(tokenizer(), text, 24, stride, 2)) == 2
    with pytest.raises(SpecError, match=f"context: found 1; allowed: {max(2, first + 1)} tokens or more"):
        text_windows(tokenizer(), text, 1)
    with pytest.raises(SpecError, match=r"^windows: found 0; allowed: 1 or more"):
        text_windows(tokenizer(), text, 24, count=0)


@pytest.mark.parametrize("stride", [None, 16])
def test_perplexity_is_that_of_a_plain_model(stride: int | None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    windows = text_windows(load_tokenizer(place / "one"), random_text(800), 64, stride)
    report = perplexity(load(place / "one"), windows)
    model = AutoModelForCausalLM.from_pretrained(place / "one", dtype=torch.float32)
    logs, targets = log_probabilities(model, windows)
    losses = -logs.gather(-1, targets[..., None])[..., 0]
    assert report.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    spread = losses.mean(1).std().item() / math.sqrt(len(windows))
    assert report.standard_error == pytest.approx(report.perplexity * spread, rel=1e-4)
    assert (report.context, report.stride, report.windows) == (64, stride or 64, 12 if stride is None else 47)
    assert report.tokens == losses.numel() == (12 * 63 if stride is None else 47 * 16)
    assert report.divergence is None


def test_divergence_is_that_of_plain_models(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    windows = text_windows(load_tokenizer(place / "one"), random_text(800), 64, 16, 9)
    one, two = load(place / "one"), load(place / "two")
    found = perplexity(one, windows, two).divergence
    (log_q, _), (log_p, _) = log_probabilities(one, windows), log_probabilities(two, windows)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).flatten().numpy()
    assert found and found.mean_kl == pytest.approx(kl.mean(), rel=1e-4) and found.mean_kl > 0.1
    assert [found.median_kl, found.kl_quantile_99] == pytest.approx(np.quantile(kl, [0.5, 0.99]).tolist(), rel=1e-4)
    assert found.top1_agreement == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert found.reference_perplexity == pytest.approx(perplexity(two, windows).perplexity, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(place: Path) -> None:
    options = TextOptions(place / "text.txt", 32, windows=1, against=place / "one")
    report = evaluate(place / "one", options).text
    assert report and report.divergence and report.standard_error is None
    divergence = report.divergence
    assert (divergence.mean_kl, divergence.kl_quantile_99, divergence.top1_agreement) == (0, 0, 1)
    assert divergence.reference_perplexity == report.perplexity


def test_json_lines_are_read_by_their_text(place: Path, tmp_path: Path) -> None:
    text = (place / "text.txt").read_text()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text, "url": "x"}))
    plain, lines = (evaluate(place / "one", TextOptions(file, 32, windows=2)).text
                    for file in (place / "text.txt", tmp_path / "text.jsonl"))  # fmt: skip
    assert plain and lines and plain.perplexity == lines.perplexity


def test_what_the_command_prints(place: Path) -> None:
    asked = ["eval", place / "gptq", "--text", place / "text.txt", "--context", 32, "--stride", 8, "--windows", 3]
    lines = bitshard(*asked, "--against", place / "one").stdout.splitlines()
    assert "(context 32, stride 8, 3 windows, 24 tokens, " in lines[0] and " +/- " in lines[0]
    assert lines[1].startswith(f"{place / 'one'}: perplexity ") and "nats per token (median " in lines[2]
    assert lines[3].startswith("same most likely token ") and len(lines) == 4
    found = json.loads(bitshard(*asked, "--json").stdout)
    assert found["text"]["stride"] == 8 and found["text"]["divergence"] is None and found["tasks"] == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--context", 1], "context: found 1; allowed: 2 tokens or more"),
        (["--stride", 0], "stride: found 0; allowed: 1 to the context, 64"),
        (["--stride", 65], "stride: found 65; allowed: 1 to the context, 64"),
        (["--stride", 32, "--windows", 99], "text.txt: found 800 tokens, 24 windows of 64; allowed: at least 99"),
        (["--context", 801], "text.txt: found 800 tokens, 0 windows of 801; allowed: at least 1"),
        (["--text", "nothing"], "nothing: found No such file or directory"),
        (["--against", "nothing/at/all"], "nothing/at/all: found no such folder"),
    ],
)
def test_a_mistake_is_one_sentence(changes: list[object], sentence: str, place: Path) -> None:
    asked = ["eval", place / "gptq", "--text", place / "text.txt", "--context", 64]
    assert sentence in refusal(*asked, *changes)


def test_a_reference_with_another_vocabulary(place: Path, tmp_path: Path) -> None:
    other = random_model(tmp_path / "other", "llama")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = ["eval", place / "gptq", "--text", place / "text.txt", "--context", 64]
    assert "other: found a vocabulary of 96 tokens, with 'a' at 67; allowed: that of " in refusal(
        *asked, "--against", other
    )


def test_a_reference_whose_logits_are_of_another_size(place: Path, tmp_path: Path) -> None:
    wide = random_model(tmp_path / "wide", "llama", vocab_size=128)
    options = TextOptions(place / "text.txt", 32, windows=1, against=wide)
    with pytest.raises(BitshardError, match="wide: found logits for 128 tokens; allowed: 96"):
        evaluate(place / "one", options)


def test_a_reference_that_predicts_nothing(place: Path, tmp_path: Path) -> None:
    broken = random_model(tmp_path / "broken", "llama")
    rewrite(broken, {"model.norm.weight": torch.full((64,), torch.nan).half()})
    with pytest.raises(CheckpointError, match="broken: found a mean loss of nan"):
        evaluate(place / "one", TextOptions(place / "text.txt", 32, windows=1, against=broken))
    with pytest.raises(CheckpointError, match="broken: found a mean loss of nan"):
        evaluate(broken, TextOptions(place / "text.txt", 32, windows=1))


@pytest.fixture
def local_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval without its own thousands of tasks, which take it seconds to list."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


def local_task(folder: Path, documents: list[dict[str, Any]], name: str = "next_letter") -> TaskOptions:
    """A task of lm-eval in this folder: multiple choice, its documents beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "documents.py").write_text(
        "import datasets\n\n\ndef shown(documents):\n    print('documents')\n    return documents\n\n\n"
        f"def read(**_):\n    print('read')\n    return {{'test': datasets.Dataset.from_list({documents!r})}}\n"
    )
    (folder / "task.yaml").write_text(
        f"task: {name}\ncustom_dataset: !function documents.read\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: gold\ndoc_to_choice: choices\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc}]\nprocess_docs: !function documents.shown\n"
    )
    return TaskOptions([name], include_path=folder)


@needs_lm_eval
@pytest.mark.usefixtures("local_only")
@pytest.mark.parametrize("checkpoint", ["one", "gptq"])
def test_a_tasks_score_is_that_of_a_plain_model(checkpoint: str, place: Path, tmp_path: Path) -> None:
    choices = list("abcdef")
    documents = [{"query": random_text(10, seed), "choices": choices, "gold": seed % 6} for seed in range(40)]
    model, tokenizer = load(place / checkpoint), load_tokenizer(place / checkpoint)
    right = []
    for document in documents[:30]:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(document["query"])["input_ids"]])).logits[0, -1]
        best = logits[tokenizer.convert_tokens_to_ids(choices)].argmax().item()
        right.append(best == document["gold"])
    tasks = load_tasks(local_task(tmp_path, documents))
    for _ in range(2):  # the tasks serve any number of models
        (score,) = task_scores(model, tokenizer, tasks, limit=30)
        assert (score.task, score.metric, score.documents, score.shots) == ("next_letter", "acc", 30, 0)
        assert score.value == pytest.approx(sum(right) / 30) and 0 < score.value < 1
        assert score.standard_error == pytest.approx(math.sqrt(score.value * (1 - score.value) / 29))


@needs_lm_eval
@pytest.mark.usefixtures("local_only")
def test_text_and_tasks_in_one_command(place: Path, tmp_path: Path) -> None:
    options = local_task(tmp_path, [{"query": "x", "choices": ["a", "b"], "gold": 0}] * 3)
    asked = ["eval", place / "one", "--tasks", "next_letter", "--include-path", options.include_path]
    found = json.loads(bitshard(*asked, "--text", place / "text.txt", "--context", 32, "--json").stdout)
    assert found["text"]["windows"] == 25 and found["tasks"][0]["task"] == "next_letter"
    lines = bitshard(*asked, "--limit", 2).stdout.splitlines()
    assert any(line.split()[:2] == ["next_letter", "acc"] and line.split()[-2:] == ["2", "0"] for line in lines)


@needs_lm_eval
@pytest.mark.usefixtures("local_only")
def test_tasks_that_cannot_be_had(place: Path, tmp_path: Path) -> None:
    local_task(tmp_path / "tasks", [])
    (tmp_path / "tasks" / "documents.py").write_text(
        "shown = id\n\n\ndef read(**_):\n    raise OSError('no such data')\n"
    )
    asked = ["eval", place / "one", "--include-path", tmp_path / "tasks", "--tasks"]
    assert "--tasks: found ''" in refusal(*asked, "")
    assert "--tasks: found 'nonsense'; allowed: a task, group, tag or glob" in refusal(*asked, "nonsense")
    assert "task next_letter: found OSError: no such data" in refusal(*asked, "next_letter")
    assert "limit: found 0" in refusal(*asked, "next_letter", "--limit", 0)
    options = local_task(tmp_path / "more", [{"query": "x", "choices": ["a", "b"], "gold": 0}])
    with pytest.raises(CheckpointError, match="found a tokenizer without a first or last token"):
        task_scores(load(place / "one"), character_tokenizer(), load_tasks(options))
    (tmp_path / "tasks").rename(tmp_path / "moved")
    assert "tasks: found no such folder" in refusal(*asked, "next_letter")


@pytest.mark.parametrize("options", [[], ["--against", "b"], ["--tasks", "piqa", "--against", "b"]])
def test_nothing_to_measure_is_wrong_usage(options: list[str]) -> None:
    assert bitshard("eval", "a", *options).code == 2


def test_tasks_without_lm_eval(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert (
        "--tasks: found no lm-eval; allowed: the package lm-eval; to do: pip install 'lm-eval>=0.4.13,<0.5'"
        in refusal("eval", place / "one", "--tasks", "piqa")
    )


@needs_lm_eval
@pytest.mark.skipif(not (ASSETS / "eval").is_dir(), reason=f"no {ASSETS / 'eval'}: not on this machine")
def test_the_benchmarks_tasks() -> None:
    """Their prompts are those of lm-eval's tasks of the same names, whose documents are on the hub."""
    names = sorted(file.stem for file in TASKS.glob("*.yaml"))
    tasks = load_tasks(TaskOptions(names, include_path=TASKS))["tasks"]
    assert {name: len(tasks[name].eval_docs) for name in names} == {
        "arc_challenge": 1172, "arc_easy": 2376, "boolq": 3270, "hellaswag": 10042, "lambada_openai": 5153,
        "openbookqa": 500, "piqa": 1838, "winogrande": 1267,
    }  # fmt: skip
    asked = {}
    for name in names:
        tasks[name].build_all_requests(limit=1, rank=0, world_size=1)
        asked[name] = [request.args for request in tasks[name].instances]
    assert asked["arc_easy"][0] == (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        " Sunlight is the source of energy for nearly all ecosystems.",
    )
    assert asked["piqa"][0][0] == "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    assert asked["winogrande"] == [
        (f"Sarah was a much better surgeon than Maria so {name}", " always got the easier cases.")
        for name in ("Sarah", "Maria")
    ]
    assert asked["lambada_openai"][0][1] == " signs" and asked["lambada_openai"][0][0].endswith("I don't care about")
    assert asked["boolq"][0][0].startswith("All biomass") and asked["boolq"][0][0].endswith("?\nAnswer:")
    assert [len(asked[name]) for name in names] == [4, 4, 2, 4, 1, 4, 2, 2]
    assert asked["hellaswag"][3] == (
        "Roof shingle removal: A man is sitting on a roof. he",
        " starts pulling up roofing on a roof.",
    )
