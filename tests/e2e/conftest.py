"""How the tests of tools/bench run a benchmark: as users do, from any folder, and with its JSON read."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipdist.errors import UserError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class EndedBenchmark:
    """What a benchmark said; `text` is its standard output with the padding of its tables left out."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return "\n".join(" ".join(line.split()) for line in self.stdout.splitlines())

    @property
    def record(self) -> dict[str, Any]:
        """The JSON of the last line; the benchmark must have ended well."""
        assert self.returncode == 0, self.stdout + self.stderr
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def bench() -> Callable[..., EndedBenchmark]:
    """bench("NAME --option ...", *words) runs tools/bench/NAME.py with all of them, on the CPU, with one thread."""

    def run(line: str, *words: object) -> EndedBenchmark:
        name, *options = line.split()
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, f"tools/bench/{name}.py", *options, *map(str, words)]
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        return EndedBenchmark(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """refused(name, *words) calls a benchmark's main() in this process, and returns the line of its UserError."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"tools/bench/{name}.py", *map(str, words)])
        with pytest.raises(UserError) as ended:
            importlib.import_module(f"tools.bench.{name}").main()
        return str(ended.value)

    return run
