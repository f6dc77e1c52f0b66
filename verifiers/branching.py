"""Branch and bound over the ReLUs of one image: which margins are positive on the whole ball, anytime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ascent import Optimised, optimise, relaxation_loss, stacked
from .milp import TOLERANCE, Answer, Encoding
from .proof import BROKEN, OPEN, PROVED, TIMEOUT
from .relax import NUMBERS, Box, Choice, ReluNetwork, crown_choice
from .witness import Hunt

ROOT_ROUNDS, ROUNDS, BATCH = 20, 8, 64
RESTARTS, STEPS, SHORT = 3, 20, 5


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
    """status proved, broken, open or timeout; a lower bound of the margin (NaN: none); the witness [1, ...] if broken."""

    status: str
    margin: float
    nodes: int
    witness: Tensor | None = None


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


class FoundError(Exception):
    """Carries a witness out of the search."""

    def __init__(self, witness: Tensor) -> None:
        super().__init__("a witness was found")
        self.witness = witness


class Search:
    """One image: `run` answers. rows [T, classes] are its margins, targets the T other classes, allowed their rounding
    allowance, milp_below the number of undecided ReLUs from which a subproblem goes to the integer programme."""

    def __init__(
        self, network: ReluNetwork, box: Box, rows: Tensor, targets: list[int], allowed: float, budget: Budget, hunt: Hunt,
        milp_below: int,
    ) -> None:
        self.network, self.box, self.rows, self.targets = network, box, rows, targets
        self.allowed, self.budget, self.hunt, self.milp_below = allowed, budget, hunt, milp_below
        self.closed = float("inf")  # the smallest bound of a subproblem that needs no more work
        self.stuck = False
        self.leaves: Leaves | None = None
        self.encoding: Encoding | None = None

    def run(self) -> Verdict:
        try:
            self._root()
            while self.leaves is not None and len(self.leaves.target):
                self._step()
        except OutOfBudgetError as limit:
            return Verdict(limit.status, self._margin(), self.budget.spent)
        except FoundError as found:
            return Verdict(BROKEN, self._margin(), self.budget.spent, found.witness)
        return Verdict(OPEN if self.stuck else PROVED, self._margin(), self.budget.spent)

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
        classes = torch.tensor(self.targets, device=points.device)[targets]
        witness = self.hunt.descend(points, classes, SHORT, self.budget.pause, first=0.2)
        if witness is not None:
            raise FoundError(witness)

    def _root(self) -> None:
        """CROWN; what it leaves open is attacked, then bounded by optimised slopes."""
        plain = crown_choice(self.box, len(self.rows))
        crown = optimise(self.network, self.box, self.rows, plain, self.allowed, 0, self.budget.pause)
        self._keep(crown, torch.arange(len(self.rows)))
        assert self.leaves is not None
        if not len(self.leaves.target):
            return
        wanted = [self.targets[t] for t in self.leaves.target.tolist()]
        witness = self.hunt.sweep(wanted, RESTARTS, STEPS, self.budget.pause)
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
        most = min(BATCH, max(1, NUMBERS // (4 * self.network.widest)), max(1, (self.budget.nodes - self.budget.spent) // 2))
        parents = self.leaves.rows(self.leaves.value.argsort(stable=True)[:most])
        chosen = parents.loss.argmax(1)
        children = parents.joined(parents)
        signs = torch.cat([torch.ones(len(chosen)), -torch.ones(len(chosen))]).to(children.choice.sign)
        sign = children.choice.sign.scatter(1, chosen.repeat(2)[:, None], signs[:, None])
        self.budget.spent += len(signs)
        keep = self.leaves.rows(self.leaves.value.argsort(stable=True)[most:])
        self._bound(children._replace(choice=children.choice._replace(sign=sign)), ROUNDS, keep)

    def _bound(self, leaves: Leaves, rounds: int, rest: Leaves | None = None) -> None:
        """Bounds these subproblems and keeps what is not proved, beside `rest`; until then the leaves stay as they were."""
        rows = self.rows[leaves.target]
        found = optimise(self.network, self.box, rows, leaves.choice, self.allowed, rounds, self.budget.pause)
        value = torch.maximum(found.bounded.value, leaves.value)  # a part of the ball is bounded by the whole, too
        found = found._replace(bounded=found.bounded._replace(value=value))
        self._keep(found, leaves.target, rest)
        self._try(self._corners(found.bounded.downhill))
        lowest = found.bounded.value.argsort(stable=True)[:4]
        self._descend(self._corners(found.bounded.downhill[lowest]), leaves.target[lowest])

    def _corners(self, downhill: Tensor) -> Tensor:
        return torch.where(downhill, self.hunt.box.lower, self.hunt.box.upper).double()

    def _keep(self, found: Optimised, target: Tensor, rest: Leaves | None = None) -> None:
        proved = (found.slack > 0) & torch.isfinite(found.bounded.value)
        self.closed = min([self.closed, *found.bounded.value[proved].tolist()])
        loss = relaxation_loss(self.box, found.bounded, found.choice)
        leaves = Leaves(target.to(loss.device), found.choice, found.bounded.value, loss).rows((~proved).nonzero().flatten())
        self.leaves = leaves if rest is None else rest.joined(leaves)

    def _solve(self, at: Tensor) -> None:
        """One subproblem by the integer programme; a point that it finds counts only if the float64 network agrees."""
        assert self.leaves is not None
        if self.encoding is None:
            self.encoding = Encoding(self.network, self.box, self.rows)
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
        reached = self.allowed + TOLERANCE / 2 * float(self.encoding.margins.size[leaf.target[0]])
        self.closed = min(self.closed, reached if answer.kind == "proved" else float(leaf.value[0]))
        self.stuck |= answer.kind != "proved"
        everything = torch.arange(len(self.leaves.target), device=at.device)
        self.leaves = self.leaves.rows(everything[everything != at])

    def _ask(self, leaf: Leaves, least: bool) -> Answer:
        assert self.encoding is not None
        nodes, seconds = self.budget.nodes - self.budget.spent, self.budget.seconds_left
        answer = self.encoding.solve(int(leaf.target[0]), leaf.choice.sign[0], self.allowed, nodes, seconds, least)
        self.budget.spent += answer.nodes
        return answer
