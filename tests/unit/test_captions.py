"""Caption metrics: pycocoevalcap's own figures, with and without Java; files of captions, protocols, baselines."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import draw_pair, write_pairs

from clipdist.data.catalog import Catalog
from clipdist.errors import UserError
from clipdist.evals import captions, protocols
from clipdist.evals.captions import PLAIN, PTB, caption_scores, constant_caption, read_predictions, tokenised

pytest.importorskip("pycocoevalcap")
ROOT = Path(__file__).resolve().parents[2]
TOOL = "tools/eval_captions.py"
IMAGES = 12
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
# What Stanford's PTB tokenizer, version 3.4.1, made of these, punctuation left out.
SENTENCES = {
    "A dog runs .": "a dog runs",
    "It's a dog's life; they're here, aren't they?": "it 's a dog 's life they 're here are n't they",
    'Two (2) men -- a "big" one...': "two -lrb- 2 -rrb- men a big one",
    "Don\u2019t \u201cstop\u201d 5.5 well-dressed men!": "do n't stop 5.5 well-dressed men",
    "In Washington D.C.": "in washington d.c.",
    "24/7 & naïve café\u2028 snow": "24/7 & naïve café snow",
    " ": "",
}


def test_tokens_without_java() -> None:
    assert tokenised(list(SENTENCES), PLAIN) == list(SENTENCES.values())


@needs_java
def test_tokens_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    plain = [sentence for sentence in SENTENCES if "\u2028" not in sentence]  # theirs has a line more there
    theirs = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(plain)})
    assert tokenised(plain, PTB) == [one for (one,) in theirs.values()]
    assert tokenised(list(SENTENCES), PTB) == list(SENTENCES.values())


@needs_java
def test_scores_are_those_of_pycocoevalcaps_own_evaluation() -> None:
    """COCOEvalCap as it is, but for SPICE, which is not in the package."""
    from pycocoevalcap import eval as theirs

    drawn = [draw_pair(number)[1] for number in range(IMAGES)]
    found = [f"A {caption}, isn't it?" for _, caption in drawn]
    found[3] = ""
    coco = type("Coco", (), {"getImgIds": lambda self: list(range(IMAGES))})()
    coco.imgToAnns = {number: [{"caption": text} for text in own] for number, own in enumerate(drawn)}
    results = type("Results", (), {"imgToAnns": {number: [{"caption": text}] for number, text in enumerate(found)}})()
    evaluation = theirs.COCOEvalCap(coco, results)
    spice = type(
        "Spice", (), {"method": lambda self: "SPICE", "compute_score": lambda self, gts, _: (0.0, [0.0] * IMAGES)}
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(theirs, "Spice", spice)
        evaluation.evaluate()
    flat = iter(tokenised([text for own in drawn for text in own], PTB))
    scores = caption_scores([[next(flat) for _ in own] for own in drawn], tokenised(found, PTB), meteor=True)
    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR")
    assert list(scores) == list(captions.METRICS)
    assert list(scores.values()) == pytest.approx([100 * evaluation.eval[name] for name in names], rel=1e-9)
    assert 10 < scores["bleu4"] < 90


def test_scores_by_hand() -> None:
    references = [["a dog runs", "the dog is running fast"], ["a red car"]]
    scores = caption_scores(references, ["a dog sleeps now", "a red car"])
    assert scores["bleu1"] == pytest.approx(100 * 5 / 7, rel=1e-6)
    assert scores["bleu2"] == pytest.approx(100 * (5 / 7 * 3 / 5) ** 0.5, rel=1e-6)
    rouge = (1 + 1.2**2) * (2 / 4) * (2 / 3) / (2 / 3 + 1.2**2 * 2 / 4)
    assert scores["rouge_l"] == pytest.approx(100 * (rouge + 1) / 2, rel=1e-6)
    assert "meteor" not in scores


# Files


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", "{}", "holds no caption"),
        ("a.json", '{"1": ["a", "b"]}', r"1: .* is no caption; expected one text for each image"),
        ("a.json", "[1]", r'expected \{"key": IMAGE, "caption": "TEXT"\}'),
        ("a.jsonl", '{"key": "1", "caption": "a"}\n{"key": "1", "caption": "b"}', "1: has two captions"),
        ("a.jsonl", '{"key": "1"}', "expected"),
        ("nowhere.json", None, "No such file"),
    ],
)
def test_bad_predictions(name: str, content: str | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        read_predictions(tmp_path / name)


def test_the_most_frequent_caption() -> None:
    assert constant_caption(["A dog .", "a  dog", "two cats", "a dog"]) == "a dog"


# The tool


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {number: {"filename": f"COCO_{number}.png"} for number in range(IMAGES)}
    return write_pairs(tmp_path_factory.mktemp("captions") / "shards", IMAGES, without_caption=[5], more=more)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls the tool in this process, by default without Java: its exit code and what it said."""
    monkeypatch.setattr(captions, "has_java", lambda: False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / TOOL), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return run


def truth(number: int) -> str:
    return draw_pair(number)[1][0]


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_the_tool_scores_files_and_baselines(tool, shards: Path, tmp_path: Path) -> None:
    numbers = [number for number in range(IMAGES) if number != 5]
    exact = write(tmp_path / "exact.json", {f"COCO_{number}.png": truth(number) for number in numbers})
    part = tmp_path / "part.jsonl"
    part.write_text("\n".join(json.dumps({"image_id": f"COCO_{n}", "caption": "A red square."}) for n in numbers[:8]))
    code, said, told = tool(exact, part, shards, "--train", shards, "--json")
    assert code == 0, told
    record = json.loads(said.splitlines()[-1])
    assert (record["images"], record["references"], record["tokenizer"]) == (8, 16, "plain")
    best, worse, constant = record["rows"]
    assert best["bleu4"] == pytest.approx(100, abs=1e-6)
    assert 0 < worse["rouge_l"] < best["rouge_l"]
    assert best["meteor"] is None
    assert constant["captions"].endswith("for all")
    assert "part.jsonl: 3 of 11 images with references have no caption" in told
    assert "without Java: METEOR is left out" in said


@needs_java
def test_java_is_taken_where_it_is(tool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "has_java", lambda: True)
    monkeypatch.setattr(captions, "_meteor", lambda *_: 0.25)  # it takes seconds to start; the test above runs it
    code, said, _ = tool(write(tmp_path / "p.json", {"COCO_1": truth(1), "COCO_2": truth(2)}), shards, "--json")
    record = json.loads(said.splitlines()[-1])
    assert (code, record["tokenizer"]) == (0, "PTB")
    assert record["rows"][0]["meteor"] == 25


def test_the_nearest_training_caption_is_that_of_the_model(
    tool, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that gives the n-th image and the n-th caption of --train the n-th axis."""
    from clipdist import config
    from clipdist.evals import embed, front
    from clipdist.models.build import build_model
    from clipdist.models.load import LoadedModel

    model = build_model(config.Model(name="configs/models/tiny_vit.json"))
    known = {draw_pair(number)[1][1]: number for number in range(IMAGES)}

    class Encode:
        seen = 0

        def __call__(self, images, tokens):
            if images is not None:
                first, self.seen = self.seen, self.seen + len(images)
                return torch.eye(64)[[number + (number >= 5) for number in range(first, first + len(images))]], None
            return None, torch.eye(64)[tokens[:, 0]]

    def tokenizer(texts):
        return torch.tensor([[known.get(text, IMAGES + 20 + number)] for number, text in enumerate(texts)])

    loaded = LoadedModel(model, tokenizer, "m", None, None)
    monkeypatch.setattr(front, "load", lambda *_: loaded)
    monkeypatch.setattr(embed, "model_encoder", lambda *_: Encode())
    code, said, told = tool(shards, "--train", shards, "--nearest", "runs/x", "--batch", IMAGES, "--json")
    assert code == 0, told
    row = json.loads(said.splitlines()[-1])["rows"][1]
    assert row["captions"] == "nearest of --train by runs/x"
    assert row["bleu4"] == pytest.approx(100, abs=1e-6)


def test_images_without_a_reference_and_other_bad_input_are_one_line(tool, shards: Path, tmp_path: Path) -> None:
    two = write_pairs(tmp_path / "two", 2, per_shard=1)  # other keys; file names 0.png and 1.png
    write_pairs(tmp_path / "more", 1)
    some = write(tmp_path / "some.json", {"COCO_1": "a", "COCO_5": "b", "zebra": "c"})
    one = write(tmp_path / "one.json", {"0.png": "a"})
    twice = write(tmp_path / "twice.json", {"COCO_1": "a", "COCO_1.png": "b"})
    for words, line in (
        ([some, shards], "some.json: 2 of 3 images have no reference"),
        ([one, two, tmp_path / "more"], "one.json: 0.png: several samples of"),
        ([twice, shards], "twice.json: COCO_1.png: has a second caption under another name"),
        ([shards], "PREDICTIONS: name a file of captions"),
        ([one], "SHARDS: name the shards"),
        ([one, shards, "--nearest", "runs/x"], "--nearest: takes captions of --train"),
        ([one, shards, "--protocol", "coco"], "--protocol and --split-file go together"),
    ):
        code, _, told = tool(*words)
        assert code == 2, line
        assert line in told


def test_a_protocol_wants_all_of_its_images(
    tool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = protocols.RetrievalProtocol("small", "coco", 3, 1)
    monkeypatch.setitem(protocols.CAPTION_PROTOCOLS, "coco", small)
    split = tmp_path / "split.json"
    named = [("COCO_4.png", "test"), ("COCO_2.png", "test"), ("COCO_9.png", "test"), ("COCO_1.png", "train")]
    write(split, {"images": [{"filename": name, "split": part} for name, part in named]})
    words = [shards, "--protocol", "coco", "--split-file", split, "--json"]
    whole = write(tmp_path / "whole.json", {f"COCO_{number}": truth(number) for number in (2, 4, 9)})
    code, said, _ = tool(whole, *words)
    record = json.loads(said.splitlines()[-1])
    assert (code, record["images"], record["protocol"]) == (0, 3, "coco")
    part = write(tmp_path / "part.json", {"COCO_2": "a"})
    code, _, told = tool(part, *words)
    assert code == 2
    assert "2 of the 3 images of --protocol coco have no caption; --allow-missing scores the others" in told
    code, said, _ = tool(part, *words, "--allow-missing")
    assert code == 0
    assert "coco, NOT the published set: 2 images missing" in said
    code, _, told = tool(write(tmp_path / "other.json", {"COCO_1": "a"}), *words)
    assert code == 2
    assert "1 of 1 images have no reference" in told


def test_catalogs_name_samples_by_key_too(shards: Path) -> None:
    references = captions.read_references(Catalog.open([str(shards)]))
    assert len(references.captions) == IMAGES - 1
    assert references.names["COCO_3"] == references.names["COCO_3.png"] == 3
