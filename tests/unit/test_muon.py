"""Muon beside torch's own on whole matrices of one process, which parameters it takes, and how ranks share the work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from clipdist import config
from clipdist.config import load_config
from clipdist.engine.fragment import Fragment
from clipdist.engine.muon import Matrix, Muon, _Round, newton_schulz, split_matrices
from clipdist.engine.optim import make_optimizer
from clipdist.errors import UserError
from clipdist.estimate.activations import meta_model
from clipdist.models.build import build_model
from clipdist.models.layers import hidden_matrices

VIT = r"visual\.(conv1\.weight|positional_embedding|proj)|"
TEXT = r"text\.(.*embedding.*|text_proj.*)"
ADAMW = {  # matrices that Muon leaves alone, by model; it has all others of two dimensions or more
    "configs/models/tiny_vit.json": VIT + TEXT,
    "configs/models/tiny_rn.json": r"visual\.(conv1|attnpool\.(positional|c_proj)).*|" + TEXT,
    "configs/models/rn50_cbow.json": r"visual\.(conv1|attnpool\.(positional|c_proj)).*|text\..*",
    "configs/models/tiny_lstm.json": VIT + r"text\.(token_embedding|proj)\..*",
    "tests/dist/timm_lcnet.json": r"visual\.trunk\.(conv_stem|blocks.*conv_dw)\.weight|" + TEXT,
    "ViT-B-16-SigLIP": r"visual\.trunk\.(pos_embed|patch_embed.*|attn_pool\.latent)|" + TEXT,
}


@pytest.mark.parametrize("name", ADAMW)
def test_matrices_are_those_of_hidden_layers(name: str) -> None:
    model = meta_model(load_config(None, [f"model.name={name}"]))[0]
    found = hidden_matrices(model)
    for parameter, tensor in model.named_parameters():
        left = tensor.ndim < 2 or re.fullmatch(ADAMW[name], parameter)
        assert (parameter in found) == (not left), parameter
        stacked = 3 if re.search(r"in_proj_weight|\.qkv\.", parameter) else 2 if ".kv." in parameter else 1
        stacked = 4 if re.search(r"[ih]h_weight", parameter) else stacked
        assert left or found[parameter] == stacked, parameter


def test_a_model_without_hidden_matrices_that_train_is_refused() -> None:
    model = build_model(config.Model(name="configs/models/tiny_cbow.json", lock_image=True))
    with pytest.raises(
        UserError, match=r"^optim\.name=muon: no matrix of a hidden layer trains; set optim\.name=adamw$"
    ):
        make_optimizer(model, config.Optim(name="muon"), cpu_offload=False)


def test_steps_are_those_of_torch_on_whole_matrices() -> None:
    """Within bf16, in which torch iterates; a filter as a matrix, q, k and v one by one."""
    torch.manual_seed(0)
    shapes = {"wide": (24, 64), "tall": (64, 24), "filter": (32, 8, 3, 3), "in_proj": (96, 32)}
    stacked = {"wide": 1, "tall": 1, "filter": 1, "in_proj": 3}
    ours = {name: nn.Parameter(torch.randn(shape) / 10) for name, shape in shapes.items()}
    before = {name: weight.detach().clone() for name, weight in ours.items()}
    matrices = split_matrices({name: weight.shape for name, weight in ours.items()}, stacked)
    assert sum(matrix.numel for matrix in matrices) == sum(weight.numel() for weight in ours.values())
    theirs = {
        name: [nn.Parameter(part.reshape(len(part), -1).clone()) for part in weight.chunk(stacked[name])]
        for name, weight in before.items()
    }
    lr, decay = 0.02, 0.5
    group = {"params": [*ours.values()], "weight_decay": decay, "orthogonal": True}
    optimizer = Muon([group], matrices, lr=lr)
    whole = [(name, w, tuple(w.shape), 0, w.numel(), w, 0, True, (0, w.numel())) for name, w in ours.items()]
    optimizer.attach(Fragment(*fields) for fields in whole)
    expected = torch.optim.Muon(
        [part for parts in theirs.values() for part in parts],
        lr=lr,
        weight_decay=decay,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(3):
        for name, weight in ours.items():
            weight.grad = torch.randn_like(weight)
            for part, gradient in zip(theirs[name], weight.grad.chunk(stacked[name])):
                part.grad = gradient.reshape(part.shape).clone()
        optimizer.step()
        expected.step()
    for name, weight in ours.items():
        moved = torch.cat([*theirs[name]]).reshape(weight.shape) - before[name]
        assert (weight - before[name] - moved).norm() < 3e-2 * moved.norm(), name


def test_singular_values_become_about_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(3, 40, 60)))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.equal(newton_schulz(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))  # not nan


def test_ranks_have_equal_shares_of_the_work() -> None:
    shapes = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12 + [(512, 512)] * 48 + [(2048, 512), (512, 2048)] * 12
    matrices = [Matrix(str(number), 0, *shape) for number, shape in enumerate(shapes)]
    work = _Round(matrices, [None] * len(matrices), [[(0, 0)] * 8] * len(matrices), torch.device("cpu"))
    assert sorted(number for owned in work.by_owner for number in owned) == [*range(len(matrices))]
    costs = [sum(matrices[number].cost for number in owned) for owned in work.by_owner]
    assert max(costs) < 1.1 * sum(costs) / len(costs)
