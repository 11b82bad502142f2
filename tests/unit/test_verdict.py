"""Who is named when a run ends, and how."""

from __future__ import annotations

from clipdist.fault_tolerance.verdict import Cause, RankState, _ranks, death, decide, hang


def states(*phases: tuple[int, str, float]) -> dict[int, RankState]:
    """Ranks with (step, phase, last progress), two on a node."""
    return {
        rank: RankState(rank, node=f"n{rank // 2}", pid=100 + rank, step=step, phase=phase, since=since)
        for rank, (step, phase, since) in enumerate(phases)
    }


def test_ranks_in_short():
    assert _ranks([5, 0, 1, 2]) == "ranks 0-2, 5"
    assert _ranks([4]) == "rank 4"


def test_the_rank_in_the_earlier_phase_of_the_same_step_is_behind():
    known = states((7, "step", 95), (7, "data", 90), (7, "step", 94))
    verdict = hang(known.values(), 100, 10, "RUN/stacks")
    assert verdict.line == (
        "no progress for 10 s: rank 1 on n0 has been at step 7 in phase data for 10 s;"
        " ranks 0, 2 at step 7 in phase step for 6 s (waiting for it?); all stacks: RUN/stacks"
    )
    assert (verdict.rank, verdict.stacks, verdict.code) == (1, True, 1)


def test_the_rank_at_the_earlier_step_is_behind():
    assert hang(states((8, "data", 0), (7, "step", 0)).values(), 100, 10, "").rank == 1


def test_training_phases_of_any_name_come_after_a_checkpoint():
    assert hang(states((0, "first step (compiles)", 0), (0, "checkpoint", 0)).values(), 100, 10, "").rank == 1


def test_nobody_is_behind_where_all_are_in_one_phase():
    verdict = hang(states(*[(7, "step", 0)] * 6).values(), 100, 10, "RUN/stacks")
    assert verdict.rank == -1
    assert verdict.line.startswith("no progress for 10 s: ranks 0-5 have been at step 7 in phase step for 100 s; all")


def test_a_rank_without_a_word_is_named_before_those_that_complain():
    known = states(*[(7, "step", 0)] * 4)
    complaint = Cause(0, "", 1, "RuntimeError: connection closed by peer")
    verdict = decide([complaint, death(known[2], False), death(known[3], True)], known)
    assert verdict.rank == 2
    assert verdict.line.startswith("rank 2 on n1 (pid 102) ended without a word (last known at step 7 in phase step)")
    assert verdict.line.endswith("; rank 3 ended as well")
    assert verdict.nodes == ["n1"]


def test_of_several_complaints_the_first_counts_with_its_exit_code():
    known = states(*[(7, "step", 0)] * 3)
    verdict = decide([Cause(2, "", 2, "no shards"), Cause(1, "", 1, "closed")], known)
    assert (verdict.line, verdict.code) == ("rank 2 on n1 ended at step 7 in phase step: no shards", 2)


def test_a_machine_that_is_gone():
    known = states((7, "step", 0))
    assert "machine is down" in decide([death(known[0], True)], known).line
