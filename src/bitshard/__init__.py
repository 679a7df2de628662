"""bitshard: low-bit language models, ordered so that tensor parallelism costs nothing at run time."""

import bitshard_autoload  # noqa: F401  transformers knows our checkpoints from here on
from bitshard.errors import BitshardError, CheckpointError, FormatError, PlanError, SolverError, SpecError
from bitshard.spec import QuantSpec

__version__ = "0.1.0"

__all__ = [
    "BitshardError",
    "CheckpointError",
    "FormatError",
    "PlanError",
    "QuantSpec",
    "SolverError",
    "SpecError",
    "__version__",
]
