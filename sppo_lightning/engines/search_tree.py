"""The tree of one prompt's search: which step to go on from, and what was found. No model, no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

_LIMITS = 8  # so many different lengths that completions may have, so that few calls of the engine do for all


@dataclass(frozen=True)
class Growth:
    """How a tree grows; tokens are those generated for one prompt."""

    budget_tokens: int  # most tokens of a search, those that are thrown away included
    response_tokens: int  # longest response
    step_tokens: int  # longest step
    branches: int  # steps drawn at once, behind one prefix
    leaves: int  # requests of one tree that wait for the engine at once
    exploration: float  # PUCT's constant
    widening: float  # exponent of a node's visits, by which more steps are drawn behind it

    @property
    def unit(self) -> int:
        """Tokens by which the completions' limits differ."""
        return max(1, self.response_tokens // _LIMITS)

    def limit(self, prefix: int) -> int:
        """Most tokens of a completion behind a prefix of so many; the response stays within its longest."""
        return (self.response_tokens - prefix) // self.unit * self.unit if prefix else self.response_tokens

    def draws(self, visits: int) -> int:
        """How many steps may have been drawn behind a node that was visited so often."""
        return self.branches * math.floor((1 + visits) ** self.widening)


@dataclass(eq=False, slots=True)
class Node:
    """A beginning of a response that ends with a step; the root is the empty one."""

    token_ids: list[int]  # from the response's first token
    log_probs: list[float]  # of each, nats, as the engine sampled it
    parent: Node | None = None
    key: str = ""  # the numbers of the children that lead here: what tells it from all others of its tree
    likelihood: float = 1.0  # of its last step, per token: the geometric mean
    ended: bool = False  # whether it is a whole response
    copies: int = 1  # how often its step was drawn behind the parent
    visits: int = 0  # responses through here, those that are being sampled included: the virtual loss
    total: float = 0.0  # of their scores
    tried: bool = False  # whether its own completion was asked for
    judged: bool = False  # whether that has a score
    drawn: int = 0  # steps that were asked for behind it
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Mean score; 0 where nothing is known."""
        return self.total / self.visits if self.visits else 0.0

    def begins(self, token_ids: Sequence[int]) -> bool:
        """Whether a response goes through here."""
        return list(token_ids[: len(self.token_ids)]) == self.token_ids

    @property
    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


@dataclass(frozen=True, slots=True)
class Job:
    """What one tree asks of the engine."""

    kind: Literal["step", "completion"]
    node: Node
    key: str  # of the noise
    samples: int
    limit: int  # most tokens of each


def puct(value: float, prior: float, visits: int, parent_visits: int, exploration: float) -> float:
    """`Q + c · P · √N / (1 + n)`: what is known of a child, and what is hoped for (AlphaZero, arXiv 1712.01815)."""
    return value + exploration * prior * math.sqrt(parent_visits) / (1 + visits)


class Tree:
    """Monte Carlo tree search for one prompt.

    A node that is reached for the first time is completed by sampling, and its response is judged. One reached
    again gets `branches` sampled steps behind it, of which equal ones are one child. Among children PUCT chooses:
    the prior is the policy's likelihood of the step per token, as a share of its siblings', and a child without
    visits is worth what its parent is. A request that waits counts as a visit with score 0, so that the next
    one goes elsewhere. All is decided by the tree alone, never by who else is searched for.
    """

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self.root = Node([], [])
        self.tokens = 0  # generated
        self.reserved = 0  # that requests under way may still generate
        self.solved = False
        self.scores: list[tuple[Node, float]] = []  # of the responses, by the node that they began from

    # ------------------------------------------------------------------ what to ask for

    def jobs(self) -> list[Job]:
        """The next requests, all of which the budget has room for; none at the search's end."""
        found: list[Job] = []
        while not self.solved and len(found) < self.growth.leaves:
            node = self.select()
            if node is None:
                break
            job = self._job(node)
            if self.tokens + self.reserved + job.samples * job.limit > self.growth.budget_tokens:
                break
            self.reserved += job.samples * job.limit
            if job.kind == "step":
                node.drawn += job.samples
            else:
                self._visit(node)
            found.append(job)
        return found

    def select(self) -> Node | None:
        """The node to go on from: depth first, the best child by PUCT first; None where nothing is left to try."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node.ended:
                continue
            if not node.tried or self._widens(node):
                return node
            stack += self._worst_first(node)
        return None

    def _worst_first(self, node: Node) -> list[Node]:
        """The children by PUCT; of equals, the one that was drawn first is better."""
        children = list(node.children.values())
        whole = sum(child.likelihood for child in children)

        def worth(child: Node) -> float:
            value = child.value if child.visits else node.value
            prior = child.likelihood / whole if whole else 1 / len(children)
            return puct(value, prior, child.visits, node.visits, self.growth.exploration)

        return sorted(children, key=worth, reverse=True)[::-1]

    def _job(self, node: Node) -> Job:
        if node.tried:
            return Job("step", node, f"{node.key}+{node.drawn}", self.growth.branches, self.growth.step_tokens)
        return Job("completion", node, f"{node.key}=", 1, self.growth.limit(len(node.token_ids)))

    def _widens(self, node: Node) -> bool:
        """Whether it is time to draw more steps behind a node, and there is room for them and a completion."""
        room = len(node.token_ids) + self.growth.step_tokens + self.growth.unit <= self.growth.response_tokens
        return room and node.drawn < self.growth.draws(node.visits)

    # ------------------------------------------------------------------ what came of it

    def generated(self, job: Job, tokens: int) -> None:
        """A request is answered, by so many tokens in all."""
        self.reserved -= job.samples * job.limit
        self.tokens += tokens

    def add(self, node: Node, token_ids: Sequence[int], log_probs: Sequence[float], ended: bool) -> Node | None:
        """A step was drawn behind `node`; a new whole response, which is yet to be judged, or None."""
        step = tuple(token_ids)
        if step in node.children:
            node.children[step].copies += 1
            return None
        child = Node(
            [*node.token_ids, *token_ids],
            [*node.log_probs, *log_probs],
            node,
            f"{node.key}.{len(node.children)}",
            math.exp(math.fsum(log_probs) / len(log_probs)),
            ended,
        )
        node.children[step] = child
        if not ended:
            return None
        self._visit(child)
        return child

    def judge(self, node: Node, score: float | None) -> None:
        """The response that began from `node` has a score, or no verdict, and is then as if it had not been."""
        for each in node.path:
            each.visits -= score is None
            each.total += score or 0.0
        if score is not None:
            node.judged = True
            self.scores.append((node, score))
            self.solved |= score >= 1.0

    def _visit(self, node: Node) -> None:
        node.tried = True
        for each in node.path:
            each.visits += 1

    def log_excess(self, token_ids: Sequence[int], score: float) -> float:
        """How much likelier than by the policy it was to pick a judged response; nats, an estimate.

        Of the tree's `M` judged responses one is picked, evenly, out of those with at least its score. It could
        have come from every judged node `s` that it begins with, and `s` is there in place of
        `π(s) ≈ ∏ copies / drawn`: so the density is `π(y) · Σ_s (1 / π(s)) / M / (share of such scores)`.
        """
        node: Node | None = self.root
        inverse, odds = 1.0, 0.0
        while node is not None:
            odds += inverse * node.judged
            ways = [child for child in node.children.values() if child.begins(token_ids)]
            inverse *= node.drawn / ways[0].copies if ways else 1.0
            node = ways[0] if ways else None
        return math.log(odds / sum(other >= score for _, other in self.scores))
