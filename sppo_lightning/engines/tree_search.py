"""Monte Carlo tree search over reasoning steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import regex  # not `re`, which cannot be stopped

from sppo_lightning.batch import FinishReason, PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling
from sppo_lightning.engines.search import Candidate, Found, Request, SearchEngine, best_first
from sppo_lightning.engines.search_tree import Growth, Job, Node, Tree
from sppo_lightning.engines.stop_strings import StopStrings
from sppo_lightning.errors import InputError

_PATTERN_SECONDS = 0.2  # for one step's text; what is not found by then is not there


@dataclass(frozen=True, slots=True)
class _Whole:
    """A whole response, from its first token, and the node that it began from."""

    prompt_index: int
    node: Node
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason


class TreeSearchEngine(SearchEngine):
    """Searches each prompt's tree of reasoning steps, until a response has full marks or the budget is used up.

    Rounds: every unsolved prompt asks for up to `leaves` steps or completions, see `Tree`. Those of all prompts
    are one call of the wrapped engine for the steps, and one for completions of each length: a completion behind
    a prefix may be up to an eighth of the longest response shorter than it could be, so that there are few.
    Steps are cheap beside responses, so a rare first step is found in fewer tokens than by independent samples;
    it is then tried as often as its likelihood per token says.

    The proposal: every token is a sample of the policy, behind the tokens before it. But steps are tried as
    often as PUCT says, not as likely as they are, and the judge picks among the responses. `log_excess` estimates
    by how much that raises a response's density, see `Tree.log_excess`; a weight against the policy is
    `exp(−log_excess)`, times the ratio of the present policy and the sampled log-probabilities.

    Source: AlphaZero's PUCT, arXiv 1712.01815, with progressive widening (Coulom 2007) and
    virtual loss (Chaslot 2008).

    Args:
        engine: What samples; that of RolloutGeneration where SearchHopeless is given the search without one.
        budget_tokens: Most tokens generated per prompt, those that are thrown away included. A request begins only
            where there is room for the longest answer.
        branches: Steps drawn at once behind one prefix.
        leaves: Requests of one prompt in one round.
        step_tokens: Longest step; one that is cut there is a step too.
        step_end: Strings that end a step; the token that completes one is the step's last.
        step_pattern: A regular expression whose first match ends a step too. An engine does not stop at it, so what
            it generated behind the match is thrown away; strings are cheaper.
        exploration: PUCT's constant; more of it follows the policy's likelihood, less of it the scores.
        widening: A node visited n times may have `branches · ⌊(1 + n)^widening⌋` steps drawn behind it.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        budget_tokens: int = 2**15,
        branches: int = 4,
        leaves: int = 4,
        step_tokens: int = 256,
        step_end: Sequence[str] = ("\n",),
        step_pattern: str | None = None,
        exploration: float = 1.0,
        widening: float = 0.5,
    ) -> None:
        super().__init__(engine)
        checks = [
            ("budget_tokens", budget_tokens, budget_tokens >= 1, "1 or more"),
            ("branches", branches, branches >= 1, "1 or more"),
            ("leaves", leaves, leaves >= 1, "1 or more"),
            ("step_tokens", step_tokens, step_tokens >= 1, "1 or more"),
            ("step_end", step_end, all(step_end) and not isinstance(step_end, str), "a list of texts, none empty"),
            ("exploration", exploration, 0 <= exploration < float("inf"), "0 or more"),
            ("widening", widening, 0 <= widening <= 1, "from 0 to 1"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise InputError(f"`{name}`={value!r} of TreeSearchEngine cannot be used; it must be {allowed}.")
        self.budget_tokens = budget_tokens
        self.branches = branches
        self.leaves = leaves
        self.step_tokens = step_tokens
        self.step_end = tuple(step_end)
        self.step_pattern = None if step_pattern is None else _compiled(step_pattern)
        self.exploration = exploration
        self.widening = widening

    def search(self, batch: PromptBatch, sampling: Sampling) -> list[Found]:
        """Grow all trees side by side; the result for a prompt is the same whatever else is in the batch."""
        if self.budget_tokens < sampling.max_new_tokens:
            raise InputError(
                f"`budget_tokens`={self.budget_tokens} of TreeSearchEngine has no room for one response of "
                f"`max_new_tokens`={sampling.max_new_tokens}; use several times as many."
            )
        trees = [Tree(self._growth(sampling)) for _ in batch.prompts]
        responses: list[list[_Whole]] = [[] for _ in trees]
        while jobs := [(i, job) for i, tree in enumerate(trees) for job in tree.jobs()]:
            wholes = self._answered(batch, trees, jobs, sampling)
            prompts = [batch.prompts[whole.prompt_index] for whole in wholes]
            scores = self.scores(prompts, [whole.token_ids for whole in wholes])
            for whole, score in zip(wholes, scores, strict=True):
                trees[whole.prompt_index].judge(whole.node, score)
                if score is not None:
                    responses[whole.prompt_index].append(whole)
        return [self._found(tree, wholes) for tree, wholes in zip(trees, responses, strict=True)]

    def _growth(self, sampling: Sampling) -> Growth:
        return Growth(
            self.budget_tokens,
            sampling.max_new_tokens,
            self.step_tokens,
            self.branches,
            self.leaves,
            self.exploration,
            self.widening,
        )

    def _answered(
        self, batch: PromptBatch, trees: list[Tree], jobs: list[tuple[int, Job]], sampling: Sampling
    ) -> list[_Whole]:
        """Ask the engine for all jobs, and grow the trees; the responses that are to be judged."""
        wholes: list[_Whole] = []
        order = sorted(jobs, key=lambda job: (job[1].kind, job[1].limit))  # stable: a tree's stay in their order
        for (kind, limit), alike in groupby(order, key=lambda job: (job[1].kind, job[1].limit)):
            group = list(alike)
            stop = (*sampling.stop, *self.step_end) if kind == "step" else sampling.stop
            settings = dataclasses.replace(
                sampling, max_new_tokens=limit, samples_per_prompt=group[0][1].samples, stop=stop
            )
            requests = [Request(i, job.node.token_ids, job.key) for i, job in group]
            for (i, job), answers in zip(group, self.sample(batch, requests, settings), strict=True):
                trees[i].generated(job, sum(len(answer.token_ids) for answer in answers))
                for answer in answers:
                    whole = self._whole(i, job, answer, trees[i], sampling)
                    wholes += [] if whole is None else [whole]
        return wholes

    def _whole(self, i: int, job: Job, answer: Response, tree: Tree, sampling: Sampling) -> _Whole | None:
        """The response that an answer completes, if it does; a step joins the tree."""
        assert self.policy is not None
        known = len(job.node.token_ids)
        ids, log_probs = [*job.node.token_ids, *answer.token_ids], [*job.node.log_probs, *answer.log_probs]
        # the engine has not seen the prefix, in which a stop string may begin
        end = StopStrings(self.policy.tokenizer, sampling.stop).cut(ids) if sampling.stop else None
        if end is not None:
            end = max(end, known + 1)
            ids, log_probs = ids[:end], log_probs[:end]
        cut = self._pattern_end(ids[known:]) if job.kind == "step" else None
        if cut is not None and known + cut < len(ids):
            ids, log_probs, end = ids[: known + cut], log_probs[: known + cut], None
        ended = end is not None or ids[-1] in self.policy.eos_token_ids
        if job.kind == "completion":
            return _Whole(i, job.node, ids, log_probs, "stop" if ended else "length")
        node = tree.add(job.node, ids[known:], log_probs[known:], ended)
        return None if node is None else _Whole(i, node, ids, log_probs, "stop")

    def _pattern_end(self, step: list[int]) -> int | None:
        """The number of a step's tokens up to the end of the pattern's first match; None where there is none."""
        assert self.policy is not None
        if self.step_pattern is None:
            return None
        starts = [step[:length] for length in range(1, len(step) + 1)]
        texts = self.policy.tokenizer.batch_decode(starts, skip_special_tokens=True)
        try:
            match = self.step_pattern.search(texts[-1], timeout=_PATTERN_SECONDS, concurrent=True)
        except TimeoutError:
            return None
        return None if match is None else 1 + next(i for i, text in enumerate(texts) if len(text) >= match.end())

    def _found(self, tree: Tree, wholes: list[_Whole]) -> Found:
        """What a tree holds; `wholes` are its judged responses, in the order of its scores."""
        found = [
            Candidate(
                Response(
                    whole.prompt_index, 0, whole.token_ids, whole.log_probs, whole.finish_reason, self.version
                ),
                score,
                tree.log_excess(whole.token_ids, score),
            )
            for whole, (_, score) in zip(wholes, tree.scores, strict=True)
        ]
        return best_first(found, tree.tokens)


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise InputError(
            f"`step_pattern`={pattern!r} of TreeSearchEngine is no regular expression: {error}."
        ) from error
    if compiled.search("") is not None:
        raise InputError(
            f"`step_pattern`={pattern!r} of TreeSearchEngine matches no text at all; let it match some."
        )
    return compiled
