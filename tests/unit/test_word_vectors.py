"""Word vectors trained on captions: neighbours in drawn captions, equal files, a tower that starts from them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import COLOURS, PLACES, write_pairs

from clipdist.config import Model
from clipdist.data.tokens import BPETokenizer
from clipdist.models.build import build_model

ROOT = Path(__file__).resolve().parents[2]
TOOL = "tools/train_word_vectors.py"
MODEL = "configs/models/tiny_cbow.json"
pytest.importorskip("gensim")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("words") / "shards", 400, per_shard=400, without_caption=[7])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls the tool in this process: its exit code and what it said."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / TOOL), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return run


def test_words_of_a_kind_are_neighbours_and_a_tower_starts_from_them(tool, shards: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "vectors.txt", tmp_path / "again.txt"
    words = [shards, "--model", MODEL, "--epochs", 10]
    code, said, told = tool(*words, "--out", out, "--nearest", "red", "left", "zebra", "--json")
    assert code == 0
    record = json.loads(said.splitlines()[-1])
    assert record["captions"] == 2 * 399
    for word, kind in (("red", COLOURS), ("left", PLACES)):
        assert sum(other in kind for other, _ in record["nearest"][word][:3]) >= 2, record["nearest"]
    assert "zebra: has no vector" in said
    assert "left out, missing caption: 1" in told

    lines = out.read_text().splitlines()
    assert lines[0] == f"{record['vectors']} 32"
    vectors = {line.split(" ")[0]: [float(number) for number in line.split(" ")[1:]] for line in lines[1:]}
    model = build_model(Model(name=MODEL, word_vectors=str(out)))
    tokenizer = BPETokenizer(2048, 16)
    rows = [tokenizer.word_id(word) for word in vectors]
    assert None not in rows
    embedding: torch.Tensor = model.text.token_embedding.weight  # type: ignore[union-attr, assignment]
    assert torch.equal(embedding[rows], torch.tensor(list(vectors.values())))

    command = [sys.executable, TOOL, *map(str, words), "--out", str(again)]  # whose hashes of words are others
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    assert again.read_bytes() == out.read_bytes()
    tool(*words, "--out", again, "--seed", 1)
    assert again.read_bytes() != out.read_bytes()


def test_tokens_have_names_of_their_own() -> None:
    tokenizer = BPETokenizer(2048, 16)
    names = [tokenizer.word_of(token) for token in range(2048)]
    known = {name: token for token, name in enumerate(names) if name is not None}
    assert len(known) == sum(name is not None for name in names) > 1700
    assert all(tokenizer.word_id(name) == token for name, token in known.items())
    assert names[2046:] == [None, None]
    ids = tokenizer(["snowboarders"])[0].tolist()
    assert [names[token] for token in ids[1 : ids.index(2047)]] == ["s@@", "now@@", "bo@@", "ar@@", "ders"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "configs/models/tiny_vit.json"], "only a CBOW or LSTM text tower takes them"),
        (["--model", "nowhere.json"], "model.name=nowhere.json: no such file"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--out", "FILE/x.txt"], "FILE/x.txt: cannot be written"),
    ],
)
def test_bad_input_is_one_line(tool, words: list[str], told: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("")
    words = [str(tmp_path / word) if word.startswith("FILE") else word for word in words]
    code, _, line = tool(shards, "--out", tmp_path / "v.txt", *words)
    assert code == 2
    assert told in line


def test_too_few_captions_are_told(tool, tmp_path: Path) -> None:
    code, _, told = tool(write_pairs(tmp_path / "few", 1), "--model", MODEL, "--out", tmp_path / "v.txt")
    assert code == 2
    assert "no word occurs 5 times in 2 captions" in told
    assert not (tmp_path / "v.txt").exists()
