"""The rules of the guard, and the update size by the formula."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipdist import config
from clipdist.engine.fragment import Fragment
from clipdist.engine.gradients import gradient_statistics
from clipdist.engine.zero import Zero
from clipdist.fault_tolerance.guard import OVERFLOWS_IN_A_ROW, Guard
from clipdist.models.dual_encoder import PARTS

WINDOW = 20
SIZES = {"image": 1.0, "text": 0.9}


def make_guard(**changed: float) -> Guard:
    return Guard(config.Guard(**{"window": WINDOW} | changed))


def filled(losses: list[float], sizes: dict[str, float] = SIZES, **changed: float) -> Guard:
    """A guard that has accepted these losses."""
    guard = make_guard(**changed)
    for step, loss in enumerate(losses):
        guard.accepted(step, loss, sizes)
    return guard


def noise(level: float, deviation: float, count: int = WINDOW, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, deviation) for _ in range(count)]


def test_what_is_not_finite_is_left_out_from_the_first_step_on():
    for loss in (math.nan, math.inf, -math.inf):
        assert "not finite" in make_guard(loss_spike=0).judge_loss(loss)


def test_no_spike_is_looked_for_before_a_window_of_accepted_steps():
    guard = filled(noise(3, 0.1)[:-1])
    assert guard.judge_loss(1e6) == ""
    assert guard.judge_updates({"image": 1e6}) == ""
    guard.accepted(WINDOW, 3.0, SIZES)
    assert guard.judge_loss(1e6)
    assert guard.judge_updates({"image": 1e6})


def test_a_loss_far_above_the_median_is_a_spike_and_one_far_below_is_not():
    guard = filled(noise(3, 0.1))
    assert "deviations above" in guard.judge_loss(5)
    assert guard.judge_loss(3.3) == ""
    assert guard.judge_loss(0.1) == ""
    assert filled(noise(3, 0.1), loss_spike=0).judge_loss(1e6) == ""


def test_outliers_among_the_accepted_hide_no_spike():
    losses = noise(3, 0.1)
    losses[:2] = [50.0, 50.0]
    assert filled(losses).judge_loss(6)


def test_noise_that_leans_upward_is_met_with_more_patience():
    level = [0.02] * (WINDOW - 4)
    assert filled([*level, *[0.02] * 4]).judge_loss(1.2)
    assert filled([*level, 0.3, 0.3, 0.3, 0.4]).judge_loss(1.2) == ""


def test_the_small_noise_of_a_plateau_or_of_a_loss_near_zero_makes_no_spikes():
    assert filled([2.772589] * WINDOW).judge_loss(3.5) == ""
    assert filled([2.772589] * WINDOW).judge_loss(3.6)
    assert filled(noise(1e-4, 1e-5)).judge_loss(0.3) == ""
    assert filled([10.0] * WINDOW).judge_loss(11.5) == ""  # a loss of another size, such as the sigmoid loss at first


@settings(max_examples=60, deadline=None)
@given(
    level=st.floats(0.01, 12), deviation=st.floats(0, 2), slope=st.floats(-0.01, 0.002), seed=st.integers(0, 1 << 30)
)
def test_a_noisy_curve_that_moves_slowly_has_no_spikes(level, deviation, slope, seed):
    guard = make_guard(window=100)
    for step, wave in enumerate(noise(0, deviation, 300, seed)):
        loss = level + slope * step + wave
        assert guard.judge_loss(loss) == "", step
        guard.accepted(step, loss, {})


def test_an_update_is_a_spike_by_tower_and_never_below_what_the_moments_expect():
    guard = filled(noise(3, 0.1), {"image": 2.0, "text": 0.01})
    assert guard.judge_updates({"image": 15.9, "text": 7.9}) == ""
    assert "image tower" in guard.judge_updates({"image": 16.1, "text": 0.01})
    assert "text tower" in guard.judge_updates({"image": 2.0, "text": 8.1})
    assert guard.judge_updates({}) == ""
    assert filled(noise(3, 0.1), update_spike=0).judge_updates({"image": 1e9}) == ""


def test_a_tower_that_has_only_begun_to_train_is_not_judged():
    guard = filled(noise(3, 0.1), {"image": 1.0})
    assert guard.judge_updates({"image": 1.0, "text": 1e3}) == ""


def test_trouble_is_more_than_patience_within_a_window_and_begins_at_the_first():
    guard = filled(noise(3, 0.1), patience=2)
    for step in (30, 34, 40):
        assert guard.rollback_start is None
        guard.skipped(step, "a reason")
    assert guard.rollback_start == 30
    guard.accepted(30 + WINDOW, 3.0, SIZES)
    assert guard.rollback_start is None
    assert guard.skipped_total == 3


def test_steps_left_out_far_apart_are_no_trouble():
    guard = filled(noise(3, 0.1), patience=2)
    for step in range(100, 100 + 50 * WINDOW, WINDOW // 2):
        guard.skipped(step, "a reason")
        assert guard.rollback_start is None


def test_without_patience_a_run_never_goes_back_and_learns_what_is_usual_anew():
    guard = filled(noise(3, 0.1), patience=0)
    steps = range(WINDOW, 4 * WINDOW)
    left_out = 0
    for step in steps:
        if guard.judge_loss(9.0):
            guard.skipped(step, "a reason")
            left_out += 1
        else:
            guard.accepted(step, 9.0, SIZES)
        assert guard.rollback_start is None
    assert left_out == WINDOW


def test_the_overflows_of_a_scale_that_finds_its_level_are_no_trouble():
    guard = make_guard(patience=1, window=100)
    for step in range(OVERFLOWS_IN_A_ROW):
        guard.overflowed(step, "overflow", scale_is_lowest=False)
    guard.accepted(OVERFLOWS_IN_A_ROW, 3.0, SIZES)
    guard.overflowed(OVERFLOWS_IN_A_ROW + 1, "overflow", scale_is_lowest=False)
    assert guard.rollback_start is None
    assert guard.skipped_total == OVERFLOWS_IN_A_ROW + 1


@pytest.mark.parametrize(("lowest", "until"), [(True, 2), (False, OVERFLOWS_IN_A_ROW + 2)])
def test_overflows_without_end_are_trouble(lowest, until):
    guard = make_guard(patience=1, window=100)
    for step in range(until):
        assert guard.rollback_start is None
        guard.overflowed(step, "overflow", lowest)
    assert guard.rollback_start == until - 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), cut=st.integers(0, 79), patience=st.integers(0, 3))
def test_a_run_that_goes_on_decides_as_one_that_was_never_interrupted(seed, cut, patience):
    draw = random.Random(seed)
    steps = [
        (draw.choice([3, 3, 3, 3, 9, math.nan]) + draw.gauss(0, 0.1), {"image": draw.choice([1.0, 1.1, 99])})
        for _ in range(80)
    ]

    def decisions(guard: Guard, first: int, last: int) -> list[object]:
        made = []
        for step in range(first, last):
            loss, sizes = steps[step]
            if step % 7 == 5:
                guard.overflowed(step, "overflow", scale_is_lowest=False)
            elif reason := guard.judge_loss(loss) or guard.judge_updates(sizes):
                guard.skipped(step, reason)
                made.append(reason)
            else:
                guard.accepted(step, loss, sizes)
            made.append(guard.rollback_start)
        return made

    cfg = config.Guard(window=10, patience=patience)
    whole, first = Guard(cfg), Guard(cfg)
    expected = decisions(whole, 0, 80)
    begun = decisions(first, 0, cut)
    second = Guard(cfg, json.loads(json.dumps(first.state(), allow_nan=False)))
    assert begun + decisions(second, cut, 80) == expected
    assert second.state() == whole.state()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(3, 4), nn.Linear(2, 5)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def part_of(self, name: str) -> str:
        return PARTS[name.partition(".")[0]]


@pytest.mark.parametrize("clip", [{}, {"grad_clip": 0.5}, {"clip_each": 0.5}])
def test_update_sizes_and_norms_by_the_formula(one_rank, clip):
    torch.manual_seed(0)
    model, beta2, eps = Towers(), 0.9, 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, beta2), eps=eps)
    engine = Zero.__new__(Zero)  # stage 0 in fp32: what DeepSpeed holds is the model and the optimiser themselves
    engine.stage, engine.device = 0, torch.device("cpu")
    engine._deepspeed = SimpleNamespace(module=model, optimizer=optimizer)
    engine._rules, engine._held = SimpleNamespace(steps=0), {}
    optim = config.Optim(beta2=beta2, eps=eps, **{"grad_clip": 0.0} | clip)
    past = {name: [] for name, _ in model.named_parameters()}
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter) * (1e-8 if name == "text.bias" else 1.0)
            if name == "text.weight" and step < 2:
                parameter.grad = None  # locked until now: it has no second moments
            past[name].append(parameter.grad)
        if step == 2:
            break
        sizes = gradient_statistics(engine, torch.tensor(2.5), optim, want_sizes=True).sizes
        assert sizes.keys() == ({"image", "text"} if step else set())
        optimizer.step()
        engine._rules.steps += 1
    found = gradient_statistics(engine, torch.tensor(2.5), optim, want_sizes=True)
    gradients = {name: gradients[-1] for name, gradients in past.items()}
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))

    def quotient(name: str) -> float:
        v = torch.zeros_like(past[name][0])
        for g in past[name][:2]:
            v = beta2 * v + (1 - beta2) * g.square()
        mean = max(float(v.mean()) / (1 - beta2**2), eps**2)
        norm = float(gradients[name].norm()) if "clip_each" in clip else total
        factor = min(1.0, 0.5 / norm) if clip else 1.0
        return float(gradients[name].square().mean()) * factor**2 / mean

    image = (12 * quotient("visual.weight") + 4 * quotient("visual.bias")) / 16
    assert found.sizes == pytest.approx({"image": math.sqrt(image), "text": math.sqrt(quotient("text.bias"))}, rel=1e-4)
    assert found.sizes["text"] < 0.1  # eps is the least that is divided by
    norm = math.sqrt(sum(float(gradients[f"visual.{name}"].square().sum()) for name in ("weight", "bias")))
    assert found.norms["image"] == pytest.approx(norm)
    assert found.not_finite == ()
    assert found.loss == 2.5
    assert gradient_statistics(engine, torch.tensor(2.5), optim, want_sizes=False).sizes == {}
    model.text.bias.grad[1] = -math.inf
    assert gradient_statistics(engine, torch.tensor(2.5), optim, want_sizes=True).not_finite == ("text.bias",)


def test_gradients_that_are_offloaded_are_read_after_their_copies_have_arrived(monkeypatch):
    buffer, arrived = torch.zeros(6), torch.arange(6.0)
    mapping = SimpleNamespace(get_lp_grad_fragment=lambda index: buffer)  # at stages 1 and 2
    parameter = SimpleNamespace(_hp_mapping=mapping, _index_in_param_group=0)
    engine = Zero.__new__(Zero)
    engine.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: buffer.copy_(arrived))
    fragment = Fragment("visual.weight", parameter, (6,), 0, 6, buffer, 0, True, (0, 6))
    assert torch.equal(engine.gradient(fragment).clone(), arrived)
