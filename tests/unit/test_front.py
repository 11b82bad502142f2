"""The offline tools' shared command line: help without torch, one line for bad input, one JSON object at the end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipdist.errors import UserError
from clipdist.evals import front

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("eval_retrieval", "export", "probe_cifar10", "search_images", "universal_perturbation", "zero_shot")
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_an_example_and_waits_for_no_torch(tool: str) -> None:
    command = [sys.executable, "-c", HELP, f"tools/{tool}.py"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"  python tools/{tool}.py runs/" in shown.stdout
    assert all(option in shown.stdout for option in ("--weights", "--trust-weights", "--json"))


def parser() -> argparse.ArgumentParser:
    made = front.make_parser("Does it.", "examples:")
    front.add_model(made, "model")
    front.add_work(made)
    return made


def test_options_have_a_least_value(capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["RN50", "--batch", "1"])
    assert (args.model, args.weights, args.device, args.batch, args.json) == ("RN50", "", "auto", 1, False)
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["RN50", "--batch", "0"])
    assert "--batch 0: must be at least 1" in capsys.readouterr().err


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    front.require_writable(None, "--out")
    front.require_writable(tmp_path / "deep" / "x.png", "--out")
    assert (tmp_path / "deep").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x.png"):
        with pytest.raises(UserError, match=rf"^--out {path}: cannot be written there"):
            front.require_writable(path, "--out")


def test_a_result_is_kept_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["RN50", "--json"])
    front.finish(args, {"top1": 50.0}, run_dir=tmp_path, tool="zero_shot")
    assert json.loads(capsys.readouterr().out) == {"top1": 50.0}
    assert json.loads((tmp_path / "results/zero_shot.json").read_text()) == {"top1": 50.0}
    front.finish(parser().parse_args(["RN50"]), {"top1": 50.0})
    assert capsys.readouterr().out == ""
