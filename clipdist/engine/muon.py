"""Muon for the hidden layers' matrices, AdamW for all other parameters, under every ZeRO stage.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the Nesterov momentum of a matrix by a matrix with
the same singular vectors and singular values near 1. Its update has the root mean square of AdamW's if multiplied by
0.2 sqrt(max(rows, columns)), so that both share one learning rate and weight decay (Liu et al., arXiv:2502.16982,
section 2.2):

    m <- beta m + (1 - beta) g        w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) NS((1 - beta) g + beta m)

NS needs whole matrices. Each matrix has one rank that computes it: it receives the fragments of the momentum from the
ranks that hold them, and returns to each rank the elements of the update that this rank applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipdist.distributed.collectives import all_gather, all_to_all_uneven, rank_and_world
from clipdist.engine.fragment import Fragment

BETA = 0.95  # of the momentum, in the references and in torch.optim.Muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic, of the steepest slope at 0
ITERATIONS = 5
EPS = 1e-7
ROUND = 1 << 23  # elements that a rank orthogonalises at one time, or one matrix: bounds the memory


@dataclass(frozen=True)
class Matrix:
    """Elements start .. start + rows * columns of the flattened parameter `name`."""

    name: str
    start: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """Multiplications of one iteration."""
        short, long = sorted((self.rows, self.columns))
        return short * short * (2 * long + short)

    @property
    def scale(self) -> float:
        """Factor that gives the update the root mean square of AdamW's, 0.2."""
        return 0.2 * math.sqrt(max(self.rows, self.columns))


def split_matrices(shapes: dict[str, torch.Size], stacked: dict[str, int]) -> list[Matrix]:
    """Return the matrices of parameters: a filter [out, in, k, k] is a matrix [out, in k k].

    Args:
        shapes: of the parameters, whole, by name.
        stacked: how many matrices lie one below the other in a parameter, such as those of q, k and v.
    """
    found = []
    for name, count in stacked.items():
        rows, columns = shapes[name][0] // count, shapes[name][1:].numel()
        found += [Matrix(name, number * rows * columns, rows, columns) for number in range(count)]
    return found


def newton_schulz(x: Tensor) -> Tensor:
    """Return about U V^T of matrices U S V^T: singular values become about 0.7 to 1.2, small ones grow 485-fold.

    Args:
        x: [matrices, rows, columns], computed in its dtype.
    """
    if x.shape[1] > x.shape[2]:
        return newton_schulz(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with "orthogonal": True are updated by Muon. Steps are collective.

    DeepSpeed replaces the parameters of groups by its own flat tensors and may call `step` for a part of them at a
    time. `attach` tells which elements of which parameter these hold. Before that, steps leave matrices alone.

    Args:
        groups: of parameters, each with "orthogonal".
        matrices: of the parameters in orthogonal groups, in the same order on every rank.
        settings: AdamW's.

    Attributes:
        parameters: names of those in orthogonal groups, which have one moment, exp_avg.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: Sequence[Matrix], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.matrices = matrices
        self.parameters = frozenset(matrix.name for matrix in matrices)
        self._fragments: dict[Tensor, list[Fragment]] | None = None
        self._rounds: dict[tuple[Tensor, ...], list[_Round]] = {}

    def attach(self, fragments: Iterable[Fragment]) -> None:
        """Take note of this rank's fragments."""
        self._fragments = {}
        for fragment in fragments:
            if fragment.name in self.parameters:
                self._fragments.setdefault(fragment.flat, []).append(fragment)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        orthogonal = {flat: group for group in groups if group["orthogonal"] for flat in group["params"]}
        orthogonal = {flat: group for flat, group in orthogonal.items() if flat.grad is not None}
        if orthogonal and self._fragments is not None:
            self._step_matrices(orthogonal, self._fragments)

    def _step_matrices(self, groups: dict[Tensor, dict[str, Any]], fragments: dict[Tensor, list[Fragment]]) -> None:
        """Update flat tensors, given with their groups."""
        for flat, group in groups.items():
            moments = self.state[flat]
            if "exp_avg" not in moments:
                moments["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
            moments["exp_avg"].lerp_(flat.grad, 1 - BETA)
            flat.mul_(1 - group["lr"] * group["weight_decay"])
        flats = tuple(groups)  # the same groups on every rank: DeepSpeed goes through them in one order
        if flats not in self._rounds:
            held = {fragment.name: fragment for flat in flats for fragment in fragments.get(flat, ())}
            self._rounds[flats] = _plan(self.matrices, held, flats[0].device)
        for matrices in self._rounds[flats]:
            for piece, update in matrices.updates(self._nesterov):
                flat = piece.fragment.flat
                piece.of(flat).add_(update, alpha=-groups[flat]["lr"] * piece.matrix.scale)

    def _nesterov(self, piece: _Piece) -> Tensor:
        flat = piece.fragment.flat
        assert flat.grad is not None
        return piece.of(flat.grad).lerp(piece.of(self.state[flat]["exp_avg"]), BETA)


@dataclass(frozen=True)
class _Piece:
    """What this rank holds of a matrix: its elements start .. stop, which lie in a fragment."""

    matrix: Matrix
    fragment: Fragment
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of a tensor laid out like the fragment's flat tensor, as a writable 1-D view."""
        first = self.matrix.start - self.fragment.start
        return self.fragment.of(tensor)[first + self.start : first + self.stop]


def _piece(matrix: Matrix, fragment: Fragment | None) -> _Piece | None:
    """Return what a fragment of the matrix's parameter has of the matrix, or None."""
    if fragment is None:
        return None
    start = max(0, fragment.start - matrix.start)
    stop = min(matrix.numel, fragment.start + fragment.numel - matrix.start)
    return _Piece(matrix, fragment, start, stop) if start < stop else None


def _plan(matrices: Sequence[Matrix], held: dict[str, Fragment], device: torch.device) -> list[_Round]:
    """Return the rounds in which matrices are orthogonalised, the same on every rank. Collective.

    Args:
        held: this rank's fragments by parameter; a matrix of which no rank has any is left out.
    """
    pieces = [_piece(matrix, held.get(matrix.name)) for matrix in matrices]
    ranges = [(piece.start, piece.stop) if piece else (0, 0) for piece in pieces]
    of_ranks = all_gather(torch.tensor([ranges], device=device)).tolist()  # [W, matrices, 2]
    world, size = len(of_ranks), 0
    rounds: list[_Round] = []
    for matrix, piece, *of_rank in zip(matrices, pieces, *of_ranks):
        if all(start == stop for start, stop in of_rank):
            continue
        if not rounds or size + matrix.numel > ROUND * world:
            rounds.append(_Round([], [], [], device))
            size = 0
        rounds[-1].matrices.append(matrix)
        rounds[-1].pieces.append(piece)
        rounds[-1].ranges.append([(start, stop) for start, stop in of_rank])
        size += matrix.numel
    return rounds


@dataclass(frozen=True)
class _Round:
    """Matrices that are orthogonalised at one time.

    Attributes:
        pieces: this rank's, of each matrix.
        ranges: by matrix, the elements start, stop that each rank holds.
        device: of the weights.
    """

    matrices: list[Matrix]
    pieces: list[_Piece | None]
    ranges: list[list[tuple[int, int]]]
    device: torch.device

    @cached_property
    def by_owner(self) -> list[list[int]]:
        """By rank, the numbers of the matrices that it orthogonalises: the next costly one goes to the least busy."""
        owned: list[list[int]] = [[] for _ in self.ranges[0]]
        busy = [0] * len(owned)
        for number in sorted(range(len(self.matrices)), key=lambda number: -self.matrices[number].cost):
            owner = busy.index(min(busy))
            owned[owner].append(number)
            busy[owner] += self.matrices[number].cost
        return owned

    def updates(self, read: Callable[[_Piece], Tensor]) -> Iterator[tuple[_Piece, Tensor]]:
        """Iterate over this rank's pieces and what they are when orthogonalised with the rest of their matrix.

        Sent and computed on a GPU in bf16, as in the references, else in fp32. Collective.

        Args:
            read: returns the elements of a piece, 1-D.
        """
        rank = rank_and_world()[0]
        own, ranks = self.by_owner[rank], range(len(self.by_owner))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        nothing = torch.empty(0, dtype=dtype, device=self.device)
        held = {number: read(piece).to(dtype) for number, piece in enumerate(self.pieces) if piece}
        sent = [[held[n] for n in self.by_owner[owner] if self._sent(n, rank, owner)] for owner in ranks]
        sizes = [[self._sent(n, sender, rank) for n in own] for sender in ranks]
        wholes = {n: nothing.new_empty(self.matrices[n].numel) for n in own}
        for sender, received in enumerate(all_to_all_uneven([torch.cat([nothing, *one]) for one in sent], sizes)):
            for n, part in zip(own, received):
                if len(part):
                    wholes[n][slice(*self.ranges[n][sender])] = part
        del held, sent
        self._orthogonalise(wholes)
        sent = [[wholes[n][slice(*self.ranges[n][receiver])] for n in own] for receiver in ranks]
        sizes = [[_length(self.ranges[n][rank]) for n in self.by_owner[owner]] for owner in ranks]
        for owner, received in enumerate(all_to_all_uneven([torch.cat([nothing, *one]) for one in sent], sizes)):
            for n, update in zip(self.by_owner[owner], received):
                if piece := self.pieces[n]:
                    yield piece, update

    def _sent(self, number: int, sender: int, owner: int) -> int:
        """Return how many elements of a matrix a rank sends to its owner, who may hold all of them (stage 0)."""
        there = _length(self.ranges[number][owner]) == self.matrices[number].numel
        return 0 if there and sender != owner else _length(self.ranges[number][sender])

    def _orthogonalise(self, wholes: dict[int, Tensor]) -> None:
        """Replace matrices, 1-D by number, in place; those of one shape in one call."""
        of_shape: dict[tuple[int, int], list[int]] = {}
        for number in wholes:
            of_shape.setdefault((self.matrices[number].rows, self.matrices[number].columns), []).append(number)
        for shape, numbers in of_shape.items():
            batch = newton_schulz(torch.stack([wholes[number] for number in numbers]).view(-1, *shape))
            wholes |= {number: one.reshape(-1) for number, one in zip(numbers, batch)}


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
