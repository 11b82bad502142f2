"""What a run says of itself where storage refuses: a note, and it goes on."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from clipdist.config import Config, Run
from clipdist.data.bad_sample import BadSample
from clipdist.errors import Fault, Unreadable, UserError
from clipdist.journal import Journal

ONE_RANK = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
REFUSED = OSError(5, "Input/output error")


@pytest.fixture
def journal(tmp_path):
    """Of a run of 10 steps, on the one rank there is."""
    plan = SimpleNamespace(
        steps=10, start_step=0, order=SimpleNamespace(global_batch=8), catalog=range(1000), resume=None, notes=[]
    )
    (tmp_path / "run").mkdir()
    made = Journal(Config(run=Run(root=str(tmp_path), name="run")), plan, ONE_RANK)
    yield made
    made.close()


def records(journal):
    return [json.loads(line) for line in (journal.config.run.dir / "metrics.jsonl").open()]


def raising(error):
    def work(*_, **__):
        raise error

    return work


def drawing(sheet):
    return SimpleNamespace(sheet=sheet)


FINDINGS = SimpleNamespace(values={"t2i_r1": 10.0})


@pytest.mark.parametrize("error", [REFUSED, BadSample("not an image"), Unreadable("a.tar: gone"), UserError("no")])
def test_a_sheet_that_cannot_be_drawn_is_left_out(journal, capsys, error):
    journal.validation(3, FINDINGS, drawing(raising(error)))
    assert "note: the picture sheet of step 3 is left out" in capsys.readouterr().out
    assert [record["t2i_r1"] for record in records(journal)] == [10.0]


def test_a_sheet_that_cannot_be_written_leaves_the_one_before(journal, capsys, monkeypatch):
    run = journal.config.run.dir
    journal.validation(3, FINDINGS, drawing(lambda _: Image.new("RGB", (8, 8))))
    before = (run / "validation.png").read_bytes()

    def cut_short(self, path, **_):
        Path(path).write_bytes(b"half")
        raise REFUSED

    monkeypatch.setattr(Image.Image, "save", cut_short)
    monkeypatch.setattr(journal.metrics, "image", lambda *_: None)
    journal.validation(6, FINDINGS, drawing(lambda _: Image.new("RGB", (9, 9))))
    assert (run / "validation.png").read_bytes() == before
    assert not (run / "validation.tmp").exists()
    assert "the picture sheet of step 6 is left out" in capsys.readouterr().out


def test_a_mistake_of_ours_is_not_hidden(journal):
    with pytest.raises(ZeroDivisionError):
        journal.validation(3, FINDINGS, drawing(raising(ZeroDivisionError())))


@pytest.mark.parametrize("error", [REFUSED, Unreadable("a.tar: gone")])
def test_a_bad_sample_without_its_key_is_named_by_its_number(journal, error):
    journal.bad.share = lambda _: (2, [(5, "not an image"), (6, "not an image")])
    good = SimpleNamespace(shard_name=lambda _: "0.tar", key=str)
    journal.bad_samples(1, good)
    journal.bad_samples(2, SimpleNamespace(shard_name=lambda _: "0.tar", key=raising(error)))
    named = [(r["shard"], r["key"]) for r in records(journal) if r["event"] == "bad_sample"]
    assert named == [("0.tar", "5"), ("0.tar", "6"), ("0.tar", "sample id 5"), ("0.tar", "sample id 6")]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (10, ""),  # of at least 1000 samples, that is 1 %
        (11, "11 of the 16 samples since the start cannot be used (68.8 %: 11 not an image), more than data.max_bad_"),
        (16, "16 of the 16 samples since the start cannot be used (100 %: 16 not an image)"),
    ],
)
def test_the_share_of_bad_samples_is_that_of_the_samples_seen(journal, bad, text):
    journal.bad.add(8, [(row, "not an image") for row in range(min(bad, 8))])
    journal.bad.add(8, [(row, "not an image") for row in range(8, bad)])
    ended = pytest.raises(UserError, match=re.escape(text)) if text else nullcontext()
    with ended:
        journal.bad_samples(2, SimpleNamespace(shard_name=lambda _: "0.tar", key=str))


def test_a_run_folder_that_takes_nothing_at_the_start_is_a_fault(journal, monkeypatch):
    monkeypatch.setattr(Path, "write_text", raising(REFUSED))
    with pytest.raises(Fault, match=r"run folder .*run: cannot be written \(Input/output error\)"):
        journal.log_start(None, "model", None)
