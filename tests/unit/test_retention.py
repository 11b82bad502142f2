"""Which checkpoints stay: by number, by step, by a metric; what is set aside, and what interrupted writers left."""

from __future__ import annotations

import math

import pytest

from clipdist.checkpoint import retention
from clipdist.checkpoint.format import MANIFEST, Manifest, checkpoint_dir, list_checkpoints
from clipdist.checkpoint.retention import RetentionPolicy, Saved, kept, prune, remove_leftovers, set_aside
from clipdist.checkpoint.writer import write_manifest, write_part
from clipdist.errors import Fault


def write(run_dir, step, metrics=None):
    folder = checkpoint_dir(run_dir, step)
    write_part(folder, 0, [], "t")
    state = {} if metrics is None else {"metrics": metrics}
    write_manifest(folder, Manifest(step, step, step, 1, {}, {}, state), "t")
    return folder


def left(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (RetentionPolicy(last=1), {6}),
        (RetentionPolicy(last=2), {5, 6}),
        (RetentionPolicy(last=9), {1, 2, 3, 4, 5, 6}),
        (RetentionPolicy(last=1, every=2), {2, 4, 6}),
        (RetentionPolicy(last=1, best="t2i_r1"), {4, 6}),  # of equals the newer one
        (RetentionPolicy(last=1, best="loss"), {3, 6}),
        (RetentionPolicy(last=1, best="val/loss"), {6}),
        (RetentionPolicy(last=0), {6}),
    ],
)
def test_what_stays(tmp_path, keep, steps):
    metrics = {
        1: {},
        2: {"t2i_r1": 30.0, "loss": 2.0},
        3: {"t2i_r1": 20.0, "loss": 1.0},
        4: {"t2i_r1": 30.0, "loss": 4.0},
        5: {"t2i_r1": math.nan, "loss": -math.inf},
        6: {"t2i_r1": 10.0, "loss": 3.0},
    }
    saved = [Saved(tmp_path / str(step), step, values) for step, values in metrics.items()]
    assert kept(saved[::-1], keep) == {tmp_path / str(step) for step in steps}


def test_prune_reads_the_metrics_and_passes_over_a_damaged_manifest(tmp_path):
    for step, value in ((1, 9.0), (2, 8.0), (3, 1.0), (4, 2.0)):
        write(tmp_path, step, {"t2i_r1": value})
    (checkpoint_dir(tmp_path, 1) / MANIFEST).write_text("{")
    prune(tmp_path, RetentionPolicy(last=1, best="t2i_r1"))
    assert left(tmp_path) == ["step-00000002", "step-00000004"]


def test_prune_clears_leftovers_and_what_was_set_aside(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (checkpoint_dir(tmp_path, 2) / MANIFEST).unlink()  # an interrupted writer's
    write_part(checkpoint_dir(tmp_path, 9), 0, [], "t")  # a writer that is at work
    for step in (3, 5):
        (tmp_path / "checkpoints" / f"rolled-back-step-{step:08d}").mkdir()
    prune(tmp_path, RetentionPolicy(last=2))
    assert left(tmp_path) == ["rolled-back-step-00000005", "step-00000003", "step-00000004", "step-00000009"]


def test_what_was_just_written_stays_beside_a_newer_one_that_may_be_damaged(tmp_path):
    for step in (1, 2, 4):
        write(tmp_path, step)
    prune(tmp_path, RetentionPolicy(last=1), written=write(tmp_path, 3))
    assert left(tmp_path) == ["step-00000003", "step-00000004"]


def test_nothing_complete_nothing_pruned(tmp_path):
    write_part(checkpoint_dir(tmp_path, 1), 0, [], "t")
    prune(tmp_path, RetentionPolicy(last=1))
    assert left(tmp_path) == ["step-00000001"]


def test_set_aside(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    write_part(checkpoint_dir(tmp_path, 8), 0, [], "t")
    aside = set_aside(tmp_path, after_step=2)
    assert [folder.name for folder in aside] == ["rolled-back-step-00000006", "rolled-back-step-00000004"]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert left(tmp_path) == ["rolled-back-step-00000004", "rolled-back-step-00000006", "step-00000002"]


def test_one_set_aside_stays_per_step(tmp_path):
    write(tmp_path, 2)
    for number in (1.0, 2.0):
        write(tmp_path, 4, {"number": number})
        (folder,) = set_aside(tmp_path, after_step=2)
    assert '"number": 2.0' in (folder / MANIFEST).read_text()
    assert left(tmp_path) == ["rolled-back-step-00000004", "step-00000002"]


def test_leftovers_make_room_and_the_one_at_work_stays(tmp_path):
    write(tmp_path, 1)
    for step in (2, 3):
        write_part(checkpoint_dir(tmp_path, step), 0, [], "t")
    assert remove_leftovers(tmp_path, writing=checkpoint_dir(tmp_path, 3))
    assert left(tmp_path) == ["step-00000001", "step-00000003"]
    assert not remove_leftovers(tmp_path, writing=checkpoint_dir(tmp_path, 3))


@pytest.mark.parametrize("every", [1, 30, 70, 100, 1000])
def test_there_is_always_one_to_go_back_to(tmp_path, every):
    """Older than the window, unless the run is younger; and not older than two windows and two saves."""
    keep, there = RetentionPolicy(last=2, back=100), []
    for step in range(every, 60 * every + 300, every):
        there = [*there, Saved(tmp_path / str(step), step, {})]
        stay = kept(there, keep)
        there = [saved for saved in there if saved.folder in stay]
        assert len(there) <= 4
        old = [saved.step for saved in there if saved.step <= step - 100]
        if step - every >= 100:
            assert old
            assert step - max(old) <= 200 + 2 * every
        else:
            assert there[0].step == every


def test_going_back_leaves_the_oldest(tmp_path):
    for step in (6, 9):
        write(tmp_path, step)
    assert [path.name for path in set_aside(tmp_path, 3)] == ["rolled-back-step-00000009"]
    assert left(tmp_path) == ["rolled-back-step-00000009", "step-00000006"]


def test_what_users_add_is_left_alone(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    strays = ["rolled-back-step-00000001-mine", "step-00000001-good", "step-00000009-half", "step-7", "step-notes"]
    for stray in strays:
        (tmp_path / "checkpoints" / stray).mkdir()
    prune(tmp_path, RetentionPolicy(last=1))
    assert left(tmp_path) == [strays[0], "step-00000001-good", "step-00000006", *strays[2:]]
    assert not remove_leftovers(tmp_path, writing=checkpoint_dir(tmp_path, 8))
    set_aside(tmp_path, after_step=0)
    assert set(strays) <= set(left(tmp_path))


def test_nothing_goes_while_it_is_not_known_which_is_the_best(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step, {"t2i_r1": 10.0 - step})

    def refused(folder):
        raise Fault(f"{folder}: cannot be read (Input/output error)")

    monkeypatch.setattr(retention, "read_manifest", refused)
    with pytest.raises(OSError, match="Input/output error"):
        prune(tmp_path, RetentionPolicy(last=1, best="t2i_r1"))
    assert len(left(tmp_path)) == 3
