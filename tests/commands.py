"""The command line inside this process: what a shell would see of it."""

from __future__ import annotations

import io
import re
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from bitshard.cli import main

SENTENCE = re.compile(r"bitshard: .+: found .+; allowed: .+; to do: .+")


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


def bitshard(*arguments: object) -> Result:
    """`bitshard ARGUMENTS`; an exception that is no exit is a traceback, and passes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["bitshard", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


def refusal(*arguments: object) -> str:
    """The one sentence of a command that must fail: exit code 1, nothing on stdout."""
    result = bitshard(*arguments)
    sentence = result.stderr.rstrip("\n").rpartition("\n")[2]
    assert result.code == 1 and not result.stdout, result
    assert SENTENCE.fullmatch(sentence) and "Traceback" not in result.stderr, result.stderr
    return sentence


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
