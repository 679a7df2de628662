"""A module imports only from layers below its own."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "bitshard"

# bottom to top; a package is one unit, whose own files may import each other
LAYERS = (
    ("errors", "progress", "versions"),
    ("spec",),
    ("bitpack", "mixed", "models", "quantized"),
    ("plan", "reorder", "layout"),
    ("quantconfig", "records"),
    ("edit", "checkpoint", "sources", "solver", "kernels", "parallel"),
    ("nn", "writer", "card", "inspection", "planning"),
    ("blockwise", "convert", "export"),
    ("ordering",),
    ("pipeline", "integrations"),
    ("bench", "doctor", "evaluate", "generate", "serve", "verify"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# who may import what from outside the standard library, torch and numpy
ENGINES = {
    "transformers": {"blockwise", "evaluate", "generate", "integrations", "sources", "verify"},
    "huggingface_hub": {"sources"},
    "accelerate": {"blockwise"},
    "gguf": {"bench", "sources"},
    "lm_eval": {"evaluate"},
    "typer": {"cli"},
    "matplotlib": {"bench", "demo", "inspection"},
    "triton": {"kernels"},
    "bitsandbytes": {"bench"},
    "gemlite": {"bench"},
    "humming": {"bench"},
    "vllm": {"bench", "integrations"},
    "peft": {"integrations"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all imports, function-level ones included; `from a.b import c` gives a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(unit: str, names: set[str]) -> list[str]:
    found = []
    for name in sorted(names):
        top, _, rest = name.partition(".")
        if top == "bitshard":
            target = rest.partition(".")[0]
            # `from bitshard import __version__` and the like come from the package itself
            if target in LEVEL and target != unit and LEVEL[target] >= LEVEL[unit]:
                found.append(f"{unit} (level {LEVEL[unit]}) imports {target} (level {LEVEL[target]})")
        elif top in ENGINES and unit not in ENGINES[top]:
            found.append(f"{unit} imports {top}")
    return found


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_module_has_a_layer() -> None:
    units = {unit_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"}
    assert units == set(LEVEL)


def test_imports_go_down_only() -> None:
    found = [v for p in SOURCE.rglob("*.py") if unit_of(p) != "__init__" for v in violations(unit_of(p), imports(p))]
    assert not found, "\n".join(found)


def test_an_import_that_goes_up_is_seen() -> None:
    assert violations("plan", {"bitshard.convert.convert"})
    assert violations("solver", {"bitshard.layout.GptqLayout", "bitshard.kernels.gptq_linear"})
    assert violations("evaluate", {"bitshard.generate.generate"})
    assert violations("kernels", {"transformers.AutoConfig"})


def test_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "triton", "matplotlib"}
    assert not {name.partition(".")[0] for name in imports(SOURCE / "__init__.py")} & heavy
