"""Branch and bound over the ReLUs of one box: are all rows of the outputs positive on the whole of it? Anytime."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ascent import Optimised, optimise, relaxation_loss, stacked
from .milp import TOLERANCE, Answer, Encoding
from .proof import BROKEN, OPEN, PROVED, TIMEOUT
from .relax import Choice, crown_choice, lower_bounds
from .witness import Hunt

ROOT_ROUNDS, ROUNDS, BATCH = 20, 20, 64
RESTARTS, STEPS, SHORT = 3, 20, 5
CANDIDATES = 4


class OutOfBudgetError(Exception):
    """The node or time limit was reached; `status` says which."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Budget:
    """Subproblems that may be bounded, and the moments (time.perf_counter) to stop, and to stop tightening the root."""

    nodes: int
    deadline: float | None
    root_until: float | None
    spent: int = 0

    @property
    def seconds_left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.perf_counter()

    def root_is_over(self) -> bool:
        return self.root_until is not None and time.perf_counter() > self.root_until

    def pause(self) -> None:
        left = self.seconds_left
        if left is not None and left <= 0:
            raise OutOfBudgetError(TIMEOUT)

    def require(self) -> None:
        """Raises unless there is budget for one more node."""
        self.pause()
        if self.spent >= self.nodes:
            raise OutOfBudgetError(OPEN)


class Verdict(NamedTuple):
    """status proved, broken, open or timeout; a lower bound of the margin (NaN: none); the witness [1, ...] if broken; how
    many integer programmes were solved."""

    status: str
    margin: float
    nodes: int
    witness: Tensor | None = None
    programmes: int = 0


class Leaves(NamedTuple):
    """Subproblems that are not proved: the target's row, the splits and multipliers, the bound, what to split next."""

    target: Tensor
    choice: Choice
    value: Tensor
    loss: Tensor

    def rows(self, at: Tensor) -> Leaves:
        return Leaves(self.target[at], self.choice.rows(at), self.value[at], self.loss[at])

    def joined(self, other: Leaves) -> Leaves:
        choice = stacked([self.choice, other.choice])
        pairs = [torch.cat([getattr(self, name), getattr(other, name)]) for name in ("target", "value", "loss")]
        return Leaves(pairs[0], choice, pairs[1], pairs[2])


def _halves(parents: Leaves, chosen: Tensor) -> Leaves:
    """Every subproblem twice, first with its chosen neuron open, then with it closed."""
    children = parents.joined(parents)
    signs = torch.cat([torch.ones(len(chosen)), -torch.ones(len(chosen))]).to(children.choice.sign)
    sign = children.choice.sign.scatter(1, chosen.repeat(2)[:, None], signs[:, None])
    return children._replace(choice=children.choice._replace(sign=sign))


class FoundError(Exception):
    """Carries a witness out of the search."""

    def __init__(self, witness: Tensor) -> None:
        super().__init__("a witness was found")
        self.witness = witness


class Search:
    """One box: `run` answers whether all margins of the hunt are above their rounding allowance. milp_below: the number of
    undecided ReLUs from which a subproblem goes to the integer programme."""

    def __init__(self, hunt: Hunt, budget: Budget, milp_below: int) -> None:
        self.hunt, self.budget, self.milp_below = hunt, budget, milp_below
        self.box, self.margins, self.allowed = hunt.box, hunt.margins, hunt.allowed
        self.closed = float("inf")  # the smallest bound of a subproblem that needs no more work
        self.stuck, self.programmes = False, 0
        self.leaves: Leaves | None = None
        self.encoding: Encoding | None = None

    def root(self) -> Verdict:
        """CROWN; what it leaves open is attacked, then bounded by optimised slopes."""
        return self._answer(self._root)

    def run(self) -> Verdict:
        """The root unless that is done, then subproblems until all are proved, one has a witness, or the budget is spent."""
        return self._answer(self._everything)

    def _answer(self, work: Callable[[], None]) -> Verdict:
        witness, status = None, PROVED
        try:
            work()
            left = self.leaves is None or len(self.leaves.target) > 0
            status = OPEN if self.stuck or left else PROVED
        except OutOfBudgetError as limit:
            status = limit.status
        except FoundError as found:
            status, witness = BROKEN, found.witness
        return Verdict(status, self._margin(), self.budget.spent, witness, self.programmes)

    def _everything(self) -> None:
        if self.leaves is None:
            self._root()
        while self.leaves is not None and len(self.leaves.target):
            self._step()

    def _margin(self) -> float:
        """A lower bound over the whole ball: the smallest over closed and open subproblems, which cover it."""
        if self.leaves is None:
            return float("nan")
        return min([self.closed, *self.leaves.value.tolist()])

    def _try(self, points: Tensor) -> None:
        witness = self.hunt.check(points)
        if witness is not None:
            raise FoundError(witness)

    def _descend(self, points: Tensor, targets: Tensor) -> None:
        witness = self.hunt.descend(points, targets, SHORT, self.budget.pause, first=0.2)
        if witness is not None:
            raise FoundError(witness)

    def _root(self) -> None:
        plain = crown_choice(self.box, len(self.allowed))
        self._keep(optimise(self.box, self.margins, plain, self.allowed, 0, self.budget.pause), torch.arange(len(self.allowed)))
        assert self.leaves is not None
        if not len(self.leaves.target):
            return
        witness = self.hunt.sweep(self.leaves.target, RESTARTS, STEPS, self.budget.pause)
        if witness is not None:
            raise FoundError(witness)
        self._bound(self.leaves, ROOT_ROUNDS)

    def _step(self) -> None:
        """The subproblems with the lowest bounds: into the integer programme if few ReLUs are undecided, else split."""
        assert self.leaves is not None
        self.budget.require()
        free = (self.leaves.choice.sign == 0).sum(1)
        small = (free <= self.milp_below).nonzero().flatten()
        if len(small):
            self._solve(small[:1])
            return
        most = min(BATCH, self.box.chunk, max(1, (self.budget.nodes - self.budget.spent) // 2))
        order = self.leaves.value.argsort(stable=True)
        parents = self.leaves.rows(order[:most])
        children = _halves(parents, self._best_splits(parents))
        self.budget.spent += len(children.target)
        self._bound(children, ROUNDS, self.leaves.rows(order[most:]))

    def _best_splits(self, parents: Leaves) -> Tensor:
        """Per subproblem the neuron, among those whose relaxation costs most, whose halves have the best bounds at once."""
        count = min(CANDIDATES, parents.loss.shape[1])
        costs, neurons = parents.loss.topk(count, 1)
        least = torch.full_like(costs, -torch.inf)
        for c in range(count):
            self.budget.pause()
            halves = _halves(parents, neurons[:, c])
            rows, allowed = self.margins.at(halves.target), self.allowed[halves.target]
            value = (lower_bounds(self.box, rows, halves.choice).value - allowed).clamp(max=0).view(2, -1)
            least[:, c] = torch.where(costs[:, c] >= 0, value.amin(0) + 0.1 * value.amax(0), least[:, c])
        return neurons.gather(1, least.argmax(1, keepdim=True)).squeeze(1)

    def _bound(self, leaves: Leaves, rounds: int, rest: Leaves | None = None) -> None:
        """Bounds these subproblems and keeps what is not proved, beside `rest`; until then the leaves stay as they were."""
        rows, allowed = self.margins.at(leaves.target), self.allowed[leaves.target]
        found = optimise(self.box, rows, leaves.choice, allowed, rounds, self.budget.pause)
        self._keep(found, leaves.target, rest, leaves.value)
        self._try(self.box.corners(found.bounded.downhill))
        lowest = found.slack.argsort(stable=True)[:4]
        self._descend(self.box.corners(found.bounded.downhill[lowest]), leaves.target[lowest])

    def _keep(self, found: Optimised, target: Tensor, rest: Leaves | None = None, known: Tensor | None = None) -> None:
        """known: the bounds of the boxes that these are parts of, and so theirs, too."""
        value = found.bounded.value if known is None else torch.maximum(found.bounded.value, known)
        proved = (found.slack > 0) & torch.isfinite(value)
        self.closed = min([self.closed, *value[proved].tolist()])
        loss = relaxation_loss(self.box, found.bounded, found.choice)
        leaves = Leaves(target, found.choice, value, loss).rows((~proved).nonzero().flatten())
        self.leaves = leaves if rest is None else rest.joined(leaves)

    def _solve(self, at: Tensor) -> None:
        """One subproblem by the integer programme; a point that it finds counts only if the float64 network agrees."""
        assert self.leaves is not None
        if self.encoding is None:
            self.encoding = Encoding(self.box, self.margins)
        leaf = self.leaves.rows(at)
        for least in (False, True):
            self.budget.require()
            answer = self._ask(leaf, least)
            if answer.kind != "found":
                break
            assert answer.point is not None
            self._try(answer.point)
            self._descend(answer.point, leaf.target)
        if answer.kind == "limit":
            left = self.budget.seconds_left
            raise OutOfBudgetError(TIMEOUT if left is not None and left < 0.05 else OPEN)
        target = int(leaf.target[0])
        reached = float(self.allowed[target]) + TOLERANCE / 2 * float(self.encoding.margins.size[target])
        self.closed = min(self.closed, reached if answer.kind == "proved" else float(leaf.value[0]))
        self.stuck |= answer.kind != "proved"
        everything = torch.arange(len(self.leaves.target))
        self.leaves = self.leaves.rows(everything[everything != at])

    def _ask(self, leaf: Leaves, least: bool) -> Answer:
        assert self.encoding is not None
        nodes, seconds = self.budget.nodes - self.budget.spent, self.budget.seconds_left
        target = int(leaf.target[0])
        answer = self.encoding.solve(target, leaf.choice.sign[0], float(self.allowed[target]), nodes, seconds, least)
        self.budget.spent += answer.nodes
        self.programmes += 1
        return answer
