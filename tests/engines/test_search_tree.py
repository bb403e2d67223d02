"""The search tree's arithmetic, worked out by hand."""

import math

import pytest

from sppo_lightning.engines.search_tree import Growth, Job, Tree, puct

A, B, C, EOS = 10, 11, 12, 1


def tree(**settings: float) -> Tree:
    chosen = {
        "budget_tokens": 1000,
        "response_tokens": 80,
        "step_tokens": 5,
        "branches": 4,
        "leaves": 1,
        "exploration": 1.0,
        "widening": 0.5,
    }
    return Tree(Growth(**chosen | settings))  # type: ignore[arg-type]


def asked(grown: Tree) -> Job:
    [job] = grown.jobs()
    return job


def complete(grown: Tree, score: float | None, tokens: int = 10) -> Job:
    job = asked(grown)
    assert job.kind == "completion"
    grown.generated(job, tokens)
    grown.judge(job.node, score)
    return job


def expand(grown: Tree, *steps: tuple[int, float]) -> Job:
    """Steps of two tokens, the first of which has this probability."""
    job = asked(grown)
    assert job.kind == "step"
    grown.generated(job, 2 * len(steps))
    for token, probability in steps:
        grown.add(job.node, [token, C], [math.log(probability), 0.0], ended=False)
    return job


def test_puct():
    assert puct(0.25, 0.5, visits=3, parent_visits=16, exploration=2.0) == 0.25 + 2.0 * 0.5 * 4 / 4
    assert puct(0.0, 0.3, visits=0, parent_visits=0, exploration=1.0) == 0.0


def test_draws_widen_with_the_square_root_of_visits():
    growth = tree().growth
    assert [growth.draws(n) for n in (0, 2, 3, 7, 8, 15)] == [4, 4, 8, 8, 12, 16]
    assert [tree(widening=0.0).growth.draws(n) for n in (0, 8, 100)] == [4, 4, 4]


def test_completions_have_few_different_limits_and_stay_within_the_response():
    growth = tree().growth  # of 80 tokens, in units of 10
    assert [growth.limit(n) for n in (0, 1, 10, 11, 69, 70)] == [80, 70, 70, 60, 10, 10]
    assert tree(response_tokens=5).growth.limit(4) == 1


def test_a_search_by_hand():
    grown = tree()
    assert complete(grown, 0.0).key == "="
    assert expand(grown, (A, 0.81), (A, 0.81), (B, 0.09), (A, 0.81)).key == "+0"
    a, b = grown.root.children.values()
    assert (a.copies, b.copies) == (3, 1)
    assert (a.likelihood, b.likelihood) == (pytest.approx(0.9), pytest.approx(0.3))  # geometric means of two tokens
    # P = 0.9 / 1.2 and 0.3 / 1.2; without visits both are worth 0, as the root is
    assert complete(grown, 0.5).node is a
    # the root: 2 visits, 0.25. a: 0.5 + 0.75 · √2 / 2 = 1.030. b: 0.25 + 0.25 · √2 / 1 = 0.604; a is drawn behind
    assert expand(grown, (C, 0.5), (C, 0.5), (C, 0.5), (C, 0.5)).node is a
    # the one child of a is worth what a is
    assert complete(grown, 0.0).node.key == ".0.0"
    # the root: 3 visits, so that four more are drawn behind it
    assert expand(grown, (B, 0.09), (A, 0.81), (A, 0.81), (A, 0.81)).key == "+4"
    assert (a.visits, a.value, b.copies) == (2, 0.25, 2)
    # a: 0.25 + 0.75 · √3 / 3 = 0.683. b: (0.5 / 3) + 0.25 · √3 = 0.600
    assert asked(grown).node.key == ".0.0"


def test_a_request_that_waits_is_a_visit_without_a_score():
    grown = tree(leaves=3)
    completion, step = grown.jobs()  # behind the root there is nothing else to ask for
    assert (completion.kind, step.kind, grown.root.visits, grown.root.value) == ("completion", "step", 1, 0.0)
    assert grown.reserved == 80 + 4 * 5
    for token in (A, A, A, B):
        grown.add(grown.root, [token], [math.log(0.5)], ended=False)
    grown.generated(step, 4)
    grown.generated(completion, 30)
    grown.judge(completion.node, 0.8)
    assert (grown.tokens, grown.reserved) == (34, 0)
    # equal priors: the first, then the other, because the first waits; then the root, at 3 visits
    assert [job.node.key for job in grown.jobs()] == [".0", ".1", ""]
    assert (grown.root.visits, grown.root.total) == (3, 0.8)


def test_the_prior_decides_where_all_fail():
    """After many failures visits are as the priors, 3 to 1."""
    grown = tree(widening=0.0, response_tokens=8, step_tokens=2, budget_tokens=10**6)
    complete(grown, 0.0)
    expand(grown, (A, 0.81), (B, 0.09))
    fresh = iter(range(100, 10**6))
    for _ in range(200):
        for job in grown.jobs():
            grown.generated(job, 1)
            if job.kind == "completion":
                grown.judge(job.node, 0.0)
            else:
                for _ in range(4):
                    grown.add(job.node, [next(fresh)], [-1.0], ended=False)
    a, b = grown.root.children.values()
    assert a.visits / b.visits == pytest.approx(3.0, rel=0.1)


def test_the_budget_has_room_for_every_request_at_its_longest():
    grown = tree(budget_tokens=100)
    assert complete(grown, 0.0, tokens=80).limit == 80
    assert asked(grown).kind == "step"  # 4 of 5 tokens: exactly what is left
    assert grown.jobs() == []
    narrow = tree(budget_tokens=99)
    complete(narrow, 0.0, tokens=80)
    assert narrow.jobs() == []


def test_a_success_ends_the_search():
    grown = tree()
    complete(grown, 1.0)
    assert grown.solved
    assert grown.jobs() == []


def test_no_verdict_is_no_visit_and_is_not_asked_for_again():
    grown = tree()
    complete(grown, None)
    assert (grown.root.visits, grown.root.total, grown.scores) == (0, 0.0, [])
    assert asked(grown).kind == "step"


def test_whole_responses_are_leaves():
    """Where every step ends the response there is nothing to go on from, and the search ends within its budget."""
    grown = tree()
    complete(grown, 0.0)
    job = asked(grown)
    grown.generated(job, 4)
    child = grown.add(grown.root, [EOS], [math.log(0.5)], ended=True)
    assert child is not None
    assert [grown.add(grown.root, [EOS], [math.log(0.5)], ended=True) for _ in range(3)] == [None] * 3
    grown.judge(child, 0.5)
    assert (child.copies, child.visits, grown.root.visits, grown.root.total) == (4, 1, 2, 0.5)
    assert grown.jobs() == []


def test_a_chain_deeper_than_python_recurs():
    """Hostile text of newlines only: one step behind the other."""
    grown = tree(budget_tokens=10**5, response_tokens=8000, step_tokens=1, branches=1, widening=0.0)
    while len(grown.scores) < 1200:
        job = asked(grown)
        grown.generated(job, 1)
        if job.kind == "step":
            grown.add(job.node, [C], [0.0], ended=False)
        else:
            grown.judge(job.node, 0.0)
    assert max(len(node.token_ids) for node, _ in grown.scores) == 1199


def test_log_excess():
    """Of 3 responses, the success is the one behind `b`, which was 1 of 4 steps drawn."""
    grown = tree()
    complete(grown, 0.0)
    expand(grown, (A, 0.81), (A, 0.81), (A, 0.81), (B, 0.09))
    for number, score in ((0, 0.0), (1, 1.0)):
        node = list(grown.root.children.values())[number]
        grown._visit(node)
        grown.judge(node, score)
    # it could come from the root, or from b, which is 4 times as frequent there; 1 of 3 is as good: 5 / 3 / (1/3)
    assert grown.log_excess([B, C, EOS], 1.0) == pytest.approx(math.log(5))
    # the root's: had it begun with a, it could have come from there too
    assert grown.log_excess([A, C, EOS], 0.0) == pytest.approx(math.log((1 + 4 / 3) / 3))
    assert grown.log_excess([C, EOS], 0.0) == pytest.approx(math.log(1 / 3))
