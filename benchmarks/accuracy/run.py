"""Measure rows of the accuracy tables: one JSON file per row in benchmarks/results/accuracy.

    python benchmarks/accuracy/run.py --model smollm2-135m=SmolLM2.gguf --rows all --gptqmodel VG/bin/python
    python benchmarks/accuracy/run.py --model smollm2-135m=SmolLM2.gguf --rows 16-bit,ours-2.9,paper-v4
    python benchmarks/accuracy/run.py --model smollm2-135m=SmolLM2.gguf --checkpoint mine=OUT
    python benchmarks/accuracy/run.py --model smollm2-135m=SmolLM2.gguf --rows ours-2.9,gptq-3 --tasks piqa,arc_easy
    python benchmarks/accuracy/run.py --model smollm2-135m=SmolLM2.gguf --rows 16-bit,ours-2.9 --evaluate c4 --windows 3

Every row is evaluated by `bitshard.evaluate` in fp32 on the dequantized weights, on the first 20 windows of 1,024
tokens of each text (--windows: fewer, in a file of their own), with KL and top-1 agreement against the 16-bit model;
with --tasks on those instead, in a file of its own. Other programs' rows need their own virtual environments
(README.md); what is quantized is kept under --work and reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType
from kquants import Ggml, importance, read_linears
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from bitshard.bench.report import header
from bitshard.checkpoint import Checkpoint
from bitshard.evaluate import TaskOptions, load_tasks, perplexity, task_scores, text_windows
from bitshard.integrations.transformers import load
from bitshard.sources import load_tokenizer, resolve, tokens_before

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "accuracy"
SAMPLES, LENGTH = 64, 512  # of calibration
CONTEXT, WINDOWS = 1024, 20  # of evaluation, without --windows
DOCUMENTS = 200  # of each task
UNCOUNTED = ("bias", "g_idx")  # a bias is 16-bit in every row; g_idx is left out in favour of those who need it


@dataclass(frozen=True)
class Made:
    """A row's model, ready to evaluate. nbytes: of the blocks' matrices. samples: segments calibrated with."""

    model: PreTrainedModel
    nbytes: int
    details: Mapping[str, Any]
    samples: int = SAMPLES


class Subject:
    """One 16-bit model and what every row of its table shares."""

    def __init__(self, name: str, path: Path, arguments: argparse.Namespace) -> None:
        self.name, self.path, self.arguments = name, path, arguments
        self.folder = resolve(str(path))
        self.tokenizer = load_tokenizer(self.folder)
        plan = Checkpoint.open(self.folder).plan()
        self.linears = {
            name: (linear.out_features, linear.in_features)
            for layer in range(plan.sizes.layers)
            for name, linear in plan.linears(layer)
        }
        self.weights = sum(n * k for n, k in self.linears.values())
        self.group_size = 128 if all(k % 128 == 0 for _, k in self.linears.values()) else 64

    def text_file(self, name: str) -> Path:
        return Path(self.arguments.texts / f"{name}.txt")

    def text(self, name: str) -> str:
        return self.text_file(name).read_text(encoding="utf-8")

    def work(self, name: str) -> Path:
        self.arguments.work.mkdir(parents=True, exist_ok=True)
        return Path(self.arguments.work / f"{self.name}-{name}")

    @cached_property
    def reference(self) -> PreTrainedModel:
        model = load(self.folder)
        remember(model, self.work("reference"))
        return model

    @cached_property
    def segments_SL(self) -> torch.Tensor:
        """The calibration segments, int64 [64, 512]; each begins with what the tokenizer puts before a text."""
        first = tokens_before(self.tokenizer)
        size = LENGTH - len(first)
        ids = self.tokenizer(self.text("mix"), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([first + ids[i * size : (i + 1) * size] for i in range(SAMPLES)])

    @cached_property
    def importance(self) -> dict[str, torch.Tensor]:
        return importance(load(self.folder), list(self.linears), self.segments_SL)

    def peer(self, option: str, script: str, arguments: Sequence[object], out: Path) -> Path:
        """What another program makes in its own environment, unless it is there."""
        python = getattr(self.arguments, option)
        if not out.exists():
            if python is None:
                raise SystemExit(f"this row needs --{option.replace('_', '-')} PYTHON; README.md says how to make it")
            # in the work folder: GPTQModel writes logs to where it runs
            subprocess.run([python, str(HERE / script), *map(str, arguments)], check=True, cwd=self.arguments.work)
        return out

    def segments_file(self) -> Path:
        path = self.work("segments.json")
        path.write_text(json.dumps(self.segments_SL.tolist()))
        return path

    def with_weights(self, weights: Mapping[str, torch.Tensor], nbytes: int, **details: Any) -> Made:
        """The 16-bit model with other matrices in its blocks, [N, K] each."""
        assert weights.keys() == self.linears.keys()
        model = load(self.folder)
        with torch.no_grad():
            for name, weight_NK in weights.items():
                model.get_parameter(f"{name}.weight").copy_(weight_NK)
        return Made(model, nbytes, details)


def remember(model: PreTrainedModel, folder: Path) -> None:
    """Keep the last hidden states of every window in a file: each row is compared with them."""
    folder.mkdir(exist_ok=True)
    forward = model.base_model.forward

    def remembered(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        path = folder / f"{hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()}.pt"
        if not path.exists():
            torch.save(forward(input_ids, **kwargs).last_hidden_state, path)
        return BaseModelOutputWithPast(last_hidden_state=torch.load(path))

    model.base_model.forward = remembered


def source(subject: Subject) -> Made:
    return Made(load(subject.folder), 2 * subject.weights, {})


def checkpoint(subject: Subject, folder: Path) -> Made:
    """A folder that bitshard reads: its own, or another program's GPTQ file."""
    return Made(load(folder), _nbytes(folder, subject), {"quantization_config": _quantization_config(folder)})


def ours(subject: Subject, row: str) -> Made:
    """What `bitshard quantize` makes with the row's options."""
    out = subject.work(row)
    if not out.exists():
        program = ["-c", WITH_CORRECTION.format(CORRECTION[row])] if row in CORRECTION else ["-m", "bitshard"]
        command = [sys.executable, *program, "quantize", str(subject.path), str(out)]
        command += ["--calibration", str(subject.text_file("mix")), "--samples", str(SAMPLES), "--length", str(LENGTH)]
        command += OURS[row].format(subject=subject).split()  # of an option given twice the last one counts
        if code := subprocess.run(command).returncode:  # it has said why
            raise SystemExit(code)
    made = checkpoint(subject, out)
    return replace(made, samples=made.details["quantization_config"]["bitshard"]["provenance"]["samples"])


def first_blocks(subject: Subject, row: str, count: int) -> Made:
    """Only the first blocks as that row has them, the others and all else 16-bit: how the prototype was measured."""
    made, model = ROWS[row](subject), load(subject.folder)
    plain_VH, ordered_VH = (one.get_input_embeddings().weight.detach() for one in (model, made.model))
    places = {channel.numpy().tobytes(): i for i, channel in enumerate(plain_VH.T.contiguous())}
    order_H = torch.tensor([places[channel.numpy().tobytes()] for channel in ordered_VH.T.contiguous()])
    for i in range(count):
        model.base_model.layers[i] = InOrder(made.model.base_model.layers[i], order_H)
    return replace(made, model=model)


class InOrder(torch.nn.Module):
    """A block whose residual stream is in another order: [..., H] -> [..., H] in the model's own."""

    def __init__(self, block: torch.nn.Module, order_H: torch.Tensor) -> None:
        super().__init__()
        self.block, self.order_H, self.back_H = block, order_H, order_H.argsort()

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.block(hidden[..., self.order_H], **kwargs)[..., self.back_H]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what transformers asks a block for, as the kind of its attention
            return getattr(super().__getattr__("block"), name)


def gptq(subject: Subject, bits: int) -> Made:
    out = subject.work(f"gptq-{bits}")
    arguments = [
        subject.folder,
        subject.segments_file(),
        out,
        "--bits",
        str(bits),
        "--group-size",
        str(subject.group_size),
    ]
    return checkpoint(subject, subject.peer("gptqmodel", "peer_gptqmodel.py", arguments, out))


def autoround(subject: Subject, row: str, bits: int, group_size: int | None = None, recipe: str = "default") -> Made:
    out = subject.work(row)
    arguments = [subject.folder, subject.segments_file(), out, "--bits", str(bits)]
    arguments += ["--group-size", str(group_size or subject.group_size), "--recipe", recipe]
    return checkpoint(subject, subject.peer("auto_round", "peer_autoround.py", arguments, out))


def llama_file(subject: Subject, kind: str) -> Made:
    """The blocks' matrices of the file that llama.cpp makes of the source file; the rest of the model stays 16-bit."""
    if subject.path.suffix != ".gguf":
        raise SystemExit(f"{subject.path}: llama.cpp's rows need the model's .gguf file")
    out = subject.work(f"{kind}.gguf")
    weights, nbytes, kinds = read_linears(
        subject.peer("llama", "peer_llama.py", [subject.path, out, "--type", kind], out)
    )
    return subject.with_weights(weights, nbytes, types=kinds, llama_cpp_python=_llama_version(subject.arguments.llama))


def padded(subject: Subject, kind: GGMLQuantizationType, imatrix: bool) -> Made:
    """Every matrix of the blocks in one K-quant type, K zero-padded to whole blocks of 256."""
    ggml = Ggml(_ggml_library(subject.arguments.llama))
    weights, total, slots = {}, 0, 0
    for name, (n, k) in subject.linears.items():
        weight_NK = subject.reference.get_parameter(f"{name}.weight").detach()
        weights[name], nbytes = ggml.quantized(weight_NK, kind, subject.importance[name] if imatrix else None)
        total += nbytes
        slots += n * (k + -k % 256)
    return subject.with_weights(
        weights, total, bits_of_padded=8 * total / slots, llama_cpp_python=_llama_version(subject.arguments.llama)
    )


# damping of the correction's least squares in place of 0.3; no option sets it
CORRECTION = {f"ours-2.9-correction-{damp:g}": damp for damp in (0.01, 0.1, 1)}
WITH_CORRECTION = """
from bitshard.cli import main
from bitshard.solver.hessian import CORRECTION_DAMP, Hessian
assert Hessian.corrected.__defaults__ == (CORRECTION_DAMP,)
Hessian.corrected.__defaults__ = ({},)
main()
"""

SWITCHED = {  # from rounding damped by 1 %, which had been the default: one thing more
    "ours-2.9-damp-0.01": "",
    "ours-2.9-natural-order": "--order none",
    "ours-2.9-ranked-by-range": "--ranking range",
    "ours-2.9-minmax": "--ranges minmax",
    "ours-2.9-no-correct": "--no-correct",
    "ours-2.9-outliers": "--outliers 0.002",
    "ours-2.9-more-outliers": "--outliers 0.005",
    "ours-2.9-one-fraction": "--fraction-4bit 0.25",
    "ours-2.9-one-fraction-paper-metadata": "--fraction-4bit 0.25 --metadata paper",
    "ours-2.9-32-segments": "--samples 32",
    "ours-2.9-128-segments": "--samples 128",
    **dict.fromkeys(CORRECTION, ""),
}

OURS = {  # options of `bitshard quantize`
    "ours-2.9": "",
    "ours-2.5": "--average-bits 2.5",
    "ours-3.3": "--average-bits 3.3",
    "ours-4.2": "--average-bits 4.2",
    "ours-tuned-2.9": "--tune 128",
    "paper-v1": "--recipe paper-v1",
    "paper-v4": "--recipe paper-v4",
    "ours-gptq-4": "--format gptq --bits 4 --group-size {subject.group_size} --order model",
    **{row: f"--damp 0.01 {options}" for row, options in SWITCHED.items()},
}

AUTOROUND: dict[str, dict[str, Any]] = {
    "autoround-2-g32": {"bits": 2, "group_size": 32},
    "autoround-3": {"bits": 3},
    "autoround-light-2-g32": {"bits": 2, "group_size": 32, "recipe": "light"},
    "autoround-light-3": {"bits": 3, "recipe": "light"},
}

ROWS: dict[str, Callable[[Subject], Made]] = {
    "16-bit": source,
    **{row: partial(ours, row=row) for row in OURS},
    **{f"gptq-{bits}": partial(gptq, bits=bits) for bits in (2, 3, 4)},
    **{
        f"{row}-first-8": partial(first_blocks, row=row, count=8)
        for row in ("ours-2.9", "ours-2.9-damp-0.01", "ours-2.9-minmax", "ours-2.9-one-fraction", "gptq-3")
    },
    **{row: partial(autoround, row=row, **options) for row, options in AUTOROUND.items()},
    **{f"{kind}-file": partial(llama_file, kind=kind) for kind in ("Q2_K", "Q3_K_S", "Q3_K_M")},
    **{
        f"{kind}-padded{suffix}": partial(padded, kind=GGMLQuantizationType[kind], imatrix=bool(suffix))
        for kind in ("Q2_K", "Q3_K")
        for suffix in ("", "-imatrix")
    },
}


def measure(subject: Subject, row: str, made: Made, texts: list[str], file: Path) -> dict[str, Any]:
    """One row: its bits from the bytes, and every text's numbers, after those that `file` has on other texts."""
    weights = weights_sha256(made.model)
    results = other_texts(file, weights, texts)
    for name in texts:
        windows = text_windows(
            subject.tokenizer, subject.text(name), CONTEXT, count=subject.arguments.windows, where=name
        )
        against = subject.reference if row != "16-bit" else None
        results[name] = asdict(perplexity(made.model, windows, against))
        results[name]["sha256"] = sha256(subject.text_file(name))
        print(f"{subject.name} {row} {name}: {results[name]['perplexity']:.3f}", flush=True)
    return {
        **described(subject, row, made),
        "source_sha256": sha256(subject.path) if subject.path.is_file() else None,
        "weights_sha256": weights,
        "calibration": {"sha256": sha256(subject.text_file("mix")), "samples": made.samples, "length": LENGTH},
        "texts": results,
        "details": dict(made.details),
    }


def other_texts(file: Path, weights: str, texts: list[str]) -> dict[str, Any]:
    """What an earlier run found on other texts, with that run's header. Ends the program where it had other weights."""
    earlier = json.loads(file.read_text()) if file.exists() else {"texts": {}}
    others = {
        name: {"header": earlier["header"], **text} for name, text in earlier["texts"].items() if name not in texts
    }
    if others and earlier.get("weights_sha256") != weights:
        raise SystemExit(f"{file}: {', '.join(others)} may be of other weights; name them in --evaluate, too")
    return others


def weights_sha256(model: PreTrainedModel) -> str:
    """Of everything that the model multiplies with, as it does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def measure_tasks(subject: Subject, row: str, made: Made, tasks: Any) -> dict[str, Any]:
    """One row's scores in what `load_tasks` returned."""
    scores = task_scores(made.model, subject.tokenizer, tasks, DOCUMENTS)
    for score in scores:
        print(f"{subject.name} {row} {score.task} {score.metric}: {score.value:.3f}", flush=True)
    return {**described(subject, row, made), "tasks": [asdict(score) for score in scores]}


def described(subject: Subject, row: str, made: Made) -> dict[str, Any]:
    return {
        "benchmark": "accuracy",
        "header": {**header("cpu"), "transformers": transformers.__version__},
        "model": subject.name,
        "row": row,
        "bits": 8 * made.nbytes / subject.weights,
    }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nbytes(folder: Path, subject: Subject) -> int:
    """Bytes of all tensors of the blocks' matrices, but biases and g_idx."""
    opened = Checkpoint.open(folder)
    modules = {name: name.rpartition(".") for name in opened.files}
    counted = [
        name for name, (module, _, suffix) in modules.items() if module in subject.linears and suffix not in UNCOUNTED
    ]
    return sum(tensor.nbytes for tensor in opened.read(counted).values())


def _quantization_config(folder: Path) -> dict[str, Any]:
    """What the file says of its quantization; of GPTQModel's notes only its version: the rest is paths, defaults."""
    config = dict(json.loads((folder / "config.json").read_text()).get("quantization_config", {}))
    meta = config.pop("meta", {})
    return config | ({"quantizer": meta["quantizer"]} if "quantizer" in meta else {})


def _of_llama(python: str | None, code: str) -> str:
    """What a line of Python prints in the virtual environment of llama-cpp-python."""
    if python is None:
        raise SystemExit("this row needs --llama PYTHON; README.md says how to make it")
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _llama_version(python: str | None) -> str:
    return _of_llama(python, "import importlib.metadata as m; print(m.version('llama-cpp-python'))")


def _ggml_library(python: str | None) -> Path:
    code = "import importlib.util as u; print(u.find_spec('llama_cpp').submodule_search_locations[0])"
    return next(Path(_of_llama(python, code), "lib").glob("libggml-base.*"))


def _pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path).expanduser().resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=_pair, required=True, metavar="NAME=PATH", help="a 16-bit folder or .gguf file")
    parser.add_argument("--rows", default="", help=f"all, or with commas of {', '.join(ROWS)}")
    parser.add_argument("--checkpoint", type=_pair, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--evaluate", default="wiki,c4", help="texts, of wiki, plain, c4 and code")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of each text, {WINDOWS} in the tables")
    parser.add_argument("--tasks", help="of lm-eval's and benchmarks/tasks, instead of texts; needs bitshard[eval]")
    parser.add_argument("--texts", type=Path, default=Path("build/accuracy/texts"), help="where texts.py wrote them")
    parser.add_argument(
        "--work", type=Path, default=Path("build/accuracy"), help="what other programs make is kept here"
    )
    for peer in ("--gptqmodel", "--auto-round", "--llama"):
        parser.add_argument(
            peer, type=os.path.abspath, metavar="PYTHON", help="the interpreter of that program's virtual environment"
        )
    arguments = parser.parse_args()
    wanted = list(ROWS) if arguments.rows == "all" else [name for name in arguments.rows.split(",") if name]
    if unknown := [name for name in wanted if name not in ROWS]:
        raise SystemExit(f"--rows: no such rows as {', '.join(unknown)}; --help names them all")
    rows = {name: ROWS[name] for name in wanted}
    rows |= {name: partial(checkpoint, folder=folder) for name, folder in arguments.checkpoint}
    name, path = arguments.model
    arguments.work = arguments.work.resolve()
    subject = Subject(name, path, arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.tasks:
        tasks = load_tasks(TaskOptions(arguments.tasks.split(","), include_path=HERE.parent / "tasks"))
    for row, make in rows.items():
        if arguments.tasks:
            file = RESULTS / f"tasks-{subject.name}-{row}.json"
            result = measure_tasks(subject, row, make(subject), tasks)
        else:
            fewer = f"-{arguments.windows}-windows" if arguments.windows != WINDOWS else ""
            file = RESULTS / f"{subject.name}-{row}{fewer}.json"
            result = measure(subject, row, make(subject), arguments.evaluate.split(","), file)
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
