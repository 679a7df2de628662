"""Every way bitshard says no: one base class, seven kinds, one sentence shape.

BitshardError
|- SpecError        an option or a specification that cannot hold
|- FormatError      a tensor, a packed layout or a config that breaks its format
|- CheckpointError  a file or folder that cannot be read or written
|- PlanError        a model or tensor-parallel degree that cannot be cut this way
|- SolverError      numbers that cannot be quantized
|- RankError        a rank of a tensor-parallel job that failed
|- BenchError       a measurement that cannot be made, or whose check is red
"""

from __future__ import annotations


class BitshardError(Exception):
    """Where it happened, what was found, what is allowed and what to do about it."""

    def __init__(self, where: str, found: str, allowed: str, fix: str) -> None:
        super().__init__(where, found, allowed, fix)
        self.where, self.found, self.allowed, self.fix = where, found, allowed, fix

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; allowed: {self.allowed}; to do: {self.fix}"


class SpecError(BitshardError, ValueError):
    """An option or a combination of options that no layout can hold."""


class FormatError(BitshardError, ValueError):
    """A tensor, a packed layout or a config section that breaks its format."""


class CheckpointError(BitshardError, RuntimeError):
    """A file or folder that cannot be read, trusted or written."""


class PlanError(BitshardError, ValueError):
    """An architecture or a tensor-parallel degree that cannot be cut this way."""


class RankError(BitshardError, RuntimeError):
    """A rank of a tensor-parallel job that failed."""


class SolverError(BitshardError, RuntimeError):
    """Numbers that cannot be quantized: a Hessian that cannot be factored, a NaN weight."""


class BenchError(BitshardError, RuntimeError):
    """A measurement that cannot be made, or whose check is red: that is not timed."""
