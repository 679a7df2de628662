"""The texts of the accuracy tables, made from the `exllamav3` package, the assets and the Python standard library.

    python benchmarks/accuracy/texts.py --assets ../shared/assets --out build/accuracy/texts

mix.txt: calibration. wiki.txt, plain.txt, c4.txt, code.txt: evaluation; none of them shares a document with mix.txt.
plain.txt is wiki.txt as people write, without WikiText's spaces before commas and points, by lm-eval's own rules.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sysconfig
from pathlib import Path

from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

PIECE, TOTAL = 20_000, 2_000_000  # characters of mix.txt
MARK = 60  # characters that tell a document: what both texts hold of it differs in length
MODULES = (
    "argparse",
    "asyncio/base_events",
    "configparser",
    "dataclasses",
    "heapq",
    "statistics",
    "tarfile",
    "zipfile",
)
MODULE = 16_000  # characters of each


def calibration_file(name: str) -> str:
    """A calibration text of the installed exllamav3, which is found without importing it: that needs a GPU."""
    spec = importlib.util.find_spec("exllamav3")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("exllamav3 is not installed: pip install --no-deps exllamav3==1.6.5")
    folder = Path(spec.submodule_search_locations[0])
    return (folder / "conversion/standard_cal_data" / f"{name}.utf8").read_text(encoding="utf-8")


def mix(wiki: str, c4: str) -> str:
    """Pieces of 20,000 characters of the two texts in turn, from the start of each, 2 million characters in all."""
    pieces = [text[start : start + PIECE] for start in range(0, TOTAL // 2, PIECE) for text in (wiki, c4)]
    return "".join(pieces)


def held_out(documents: list[str], calibration: str) -> list[str]:
    """The documents no part of which opens, closes or lies in the calibration text."""
    seen = _plain(calibration)
    return [text for text in documents if not any(mark in seen for mark in _marks(_plain(text)))]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _marks(text: str) -> list[str]:
    """Strings of 60 characters at the start, the quarters and the end of a document."""
    last = max(len(text) - MARK, 0)
    return [text[at : at + MARK] for at in sorted({0, last // 4, last // 2, 3 * last // 4, last})]


def make(assets: Path, out: Path) -> None:
    """Write the five texts to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    wiki, c4 = calibration_file("wiki"), calibration_file("c4")
    lines = (assets / "c4/c4-en-train-first1000.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    kept = held_out(documents, c4)
    library = Path(sysconfig.get_path("stdlib"))
    raw = (assets / "wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")
    texts = {
        "mix": mix(wiki, c4),
        "wiki": raw,
        "plain": wikitext_detokenizer({"page": raw}),
        "c4": "\n\n".join(kept),
        "code": "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8")[:MODULE] for name in MODULES),
    }
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text):,} characters")
    print(f"c4.txt holds {len(kept)} of {len(documents)} documents; the others are in the calibration text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--out", type=Path, default=Path("build/accuracy/texts"))
    arguments = parser.parse_args()
    make(arguments.assets, arguments.out)


if __name__ == "__main__":
    main()
