"""launch/snapshot.py: what a snapshot holds, when it is another one, and that half of one is never seen."""

from __future__ import annotations

import json
import os

import pytest
from stand_in import make_repository, write_trainer

from clipdist.config import load_config
from clipdist.errors import UserError
from launch import snapshot
from launch.snapshot import take_snapshot


@pytest.fixture
def repository(tmp_path):
    return make_repository(tmp_path / "repository")


def config(tmp_path, *words: str):
    return load_config(None, [f"run.root={tmp_path}/runs", *words])


def test_it_holds_the_code_as_it_is_and_the_resolved_configuration(repository, tmp_path):
    wanted = config(tmp_path, "optim.lr=0.25")
    folder = take_snapshot(wanted, repository)
    assert folder.parent == tmp_path / "runs/run/code"
    assert load_config(folder / "config.yaml") == wanted
    assert (folder / "clipdist/train.py").read_text() == (repository / "clipdist/train.py").read_text()
    assert (folder / "launch/after.sh").is_file()
    assert (folder / "configs/models/tiny_vit.json").is_file()
    assert json.loads((folder / "snapshot.json").read_text())["hash"] == folder.name


def test_shell_lines_come_back_as_they_were(repository, tmp_path):
    lines = ["export A=${HOME}/bin:$PATH", "b ${C:-'d e'} \"${F}\""]
    wanted = config(tmp_path, f"launch.setup={json.dumps([line.replace('${', chr(92) + '${') for line in lines])}")
    assert wanted.launch.setup == lines
    assert load_config(take_snapshot(wanted, repository) / "config.yaml") == wanted


def test_the_same_contents_are_one_snapshot_and_others_another(repository, tmp_path):
    first = take_snapshot(config(tmp_path), repository)
    inode = first.stat().st_ino
    assert take_snapshot(config(tmp_path), repository) == first
    assert first.stat().st_ino == inode
    assert take_snapshot(config(tmp_path, "optim.lr=0.25"), repository) != first
    write_trainer(repository, "two")
    assert take_snapshot(config(tmp_path), repository) != first
    assert "'one'" in (first / "clipdist/train.py").read_text()


def test_a_model_of_the_users_own_comes_along(repository, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    folder = take_snapshot(config(tmp_path, "model.name=mine/model.json"), repository)
    assert (folder / "mine/model.json").read_text() == "{}"


def test_a_copy_that_fails_leaves_nothing_behind(repository, tmp_path, monkeypatch):
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match=r"cannot be copied there .No space left on device"):
        take_snapshot(config(tmp_path), repository)
    assert list((tmp_path / "runs/run/code").iterdir()) == []


def test_of_two_at_one_time_the_first_stays(repository, tmp_path, monkeypatch):
    rename = os.rename

    def beaten(source, target) -> None:
        target.mkdir()
        (target / "first").touch()
        rename(source, target)

    monkeypatch.setattr(snapshot.os, "rename", beaten)
    folder = take_snapshot(config(tmp_path), repository)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
