"""Makes transformers know bitshard's checkpoints wherever it is used; `bitshard.pth` imports this when Python starts.

transformers has no entry point for quantization methods, and a checkpoint of one that it does not know it fills with
random numbers, which it only warns of. So when its list of methods is imported, by whomever, our half is too, or, where
that is a part of importing its models, after these. Until then this costs what a module of few lines does, and imports
nothing.
"""

import sys

METHODS, MODELS = "transformers.quantizers", "transformers.modeling_utils"


class Finder:
    """Finds the two modules as the others would, and has our half imported after them."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in (METHODS, MODELS):
            return None
        finders = [finder for finder in sys.meta_path if finder is not cls and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in found if spec), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                execute(module)
                if module.__name__ == MODELS or (module.__name__ == METHODS and MODELS not in sys.modules):
                    register(last=module.__name__ == MODELS)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(last: bool) -> None:
    """last: no other chance comes, so that failing is worth a line; others use transformers for other models."""
    try:
        import bitshard.integrations.transformers  # noqa: F401
    except Exception as error:
        if last:
            print(f"bitshard: transformers will not know its checkpoints here: {error}", file=sys.stderr)


if METHODS in sys.modules:
    register(last=True)
elif Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)
