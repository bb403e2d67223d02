"""Rare successes are kept, and the first update of later iterations learns from them again."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_run import BAD, GOOD, GivesSpares, Scripted
from scripted_run import fit as fit_script
from tiny import (
    EvenRows,
    Recites,
    RecordingSPPO,
    loader,
    make_batch,
    make_critic,
    make_policy,
    make_trainer,
    response_log_probs,
)
from tiny_run import Recorder
from torch import Tensor

from sppo_lightning.advantages import GroupAdvantage
from sppo_lightning.batch import Prompt, PromptBatch, Success
from sppo_lightning.callbacks import DynamicSampling, RolloutGeneration, SearchHopeless, SuccessReplay, Verifier
from sppo_lightning.engines import BestOfN, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.found_losses import Demonstrations, OffPolicySamples
from sppo_lightning.objectives import TokenClipObjective
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.warmup import CriticWarmup

Turn = Mapping[str, Sequence[str]]
WRONG: Turn = {"1 + 2 =": ["1 <eos>"], "2 + 2 =": ["1 <eos>"], "9 - 4 =": ["1 <eos>"], "8 8": ["1 <eos>"]}
STILL = GroupOptimizer(lr=0.0, weight_decay=0.0)
UNTRUNCATED = OffPolicySamples(math.inf)


class Turns(Recites):
    """Each iteration has a table of its own."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        super().__init__({})
        self.turns = iter(turns)

    def process(self, batch: PromptBatch, trainer: Any, module: Any) -> None:
        self.responses = next(self.turns)
        super().process(batch, trainer, module)


class HasQ(Verifier):
    """Right where the response has a `q`; it does not say where there is a `u`."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [None if "u" in response else float("q" in response) for response in responses]


class Watched(SuccessReplay):
    """What is stored after each iteration: row, response and the iteration in which it was seen last."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        self.watched = [*getattr(self, "watched", []), list(self.store.stored)]

    @property
    def kept(self) -> list[list[tuple[int, list[int], int]]]:
        return [[(s.prompt.row, [*s.response_ids], s.iteration) for s in stored] for stored in self.watched]


def fit(
    stage: SuccessReplay | None, *turns: Turn, folder: Path | None = None, **settings: Any
) -> tuple[RecordingSPPO, Recorder]:
    """An iteration per turn; V is 1/2 and nothing moves, so that gradients can be compared."""
    policy, recorder = make_policy(), Recorder()
    critic = settings.pop("critic", make_critic(zero=True))
    module = RecordingSPPO(policy, critic, policy_optimizer=STILL, critic_optimizer=STILL, **settings)
    stages = [Turns(turns), HasQ(), *([] if stage is None else [stage]), recorder]
    more = {} if folder is None else {"default_root_dir": str(folder)}
    trainer = make_trainer(*stages, precision="64-true", log_every_n_steps=1, **more)
    trainer.fit(module, loader(*(make_batch(policy, list(turn)) for turn in turns)))
    return module, recorder


def logged(recorder: Recorder, name: str) -> list[float | None]:
    return [metrics.get(f"replay/{name}") for metrics in recorder.iterations]


def log_likelihood(policy: Any, success: Success) -> Tensor:
    return response_log_probs(policy, success.prompt_ids, success.response_ids).sum()


def test_successes_are_kept_while_their_prompts_record_is_low():
    """`(k·V + s) / (k + n)` is (1 + s) / (2 + n) here: 2/3, 5/7, 1.75/3.75, 2.375/3.875, 2.6875/3.9375, 2.84375/3.96875."""
    first = ["q <eos>", "q <eos>", "1 <eos>", "q <eos>", "1 q <eos>", "q <eos>"]
    turns = [{**WRONG, "1 + 2 =": [said], "2 + 2 =": ["q 1 1"], "9 - 4 =": ["q u <eos>"]} for said in first]
    stage = Watched(below=0.7, prior_strength=2.0, decay=0.5)
    _, recorder = fit(stage, *turns)
    q, one = make_policy().tokenizer.convert_tokens_to_ids(["q", "1"])
    both = [(0, [q, 1], 3), (0, [one, q, 1], 4)]
    assert stage.kept == [[(0, [q, 1], 0)], [], [], both[:1], both, []]
    assert logged(recorder, "stored") == [1, 0, 0, 1, 2, 0]
    assert logged(recorder, "retired") == [0, 1, 0, 0, 0, 2]
    assert logged(recorder, "rows") == [0, 1, 0, 0, 1, 2]  # what the iteration before left
    [success] = stage.watched[0]
    assert (success.reward, [*success.log_probs], success.prompt.text) == (1.0, [-1.0, -1.0], "1 + 2 =")
    assert [*success.prompt_ids] == make_policy().tokenizer("1 + 2 =")["input_ids"]


def test_the_first_update_of_an_iteration_learns_from_what_is_drawn():
    """Each turn has two updates. Shares are powers of 2, since the model's norms round to float32."""
    turns = [{**WRONG, "1 + 2 =": ["q <eos>"], "8 8": ["8 q <eos>"]}, WRONG, WRONG]
    stage = Watched(below=0.9, loss=UNTRUNCATED, coef=0.5, half_life_iterations=1.0)
    joined, recorder = fit(stage, *turns, mini_batch_size=2)
    alone, _ = fit(None, *turns, mini_batch_size=2)
    policy = make_policy().double()
    assert [success.prompt.row for success in stage.watched[0]] == [0, 3]
    own = [log_likelihood(policy, success) for success in stage.watched[0]]
    # A = 1/2, and each token was sampled with a log-probability of −1
    weights = [0.5 * float((row.detach() + tokens).exp()) for row, tokens in zip(own, (2, 3), strict=True)]
    loss = -sum(weight * row for weight, row in zip(weights, own, strict=True)) / 5
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    for iteration, share in enumerate([0.0, 0.5, 0.25]):
        for (name, _), gradient in zip(policy.named_parameters(), gradients, strict=True):
            first, second = (
                joined.gradients[i][f"policy.{name}"] - alone.gradients[i][f"policy.{name}"]
                for i in (2 * iteration, 2 * iteration + 1)
            )
            torch.testing.assert_close(first, 0.5 * share * gradient, atol=1e-12, rtol=1e-9)
            assert not second.any()
        if share:
            assert logged(recorder, "weight_mean")[iteration] == pytest.approx(share * sum(weights) / 2)
            assert logged(recorder, "loss")[iteration] == pytest.approx(share * float(loss.detach()))
    assert logged(recorder, "age_mean") == [None, 1.0, 2.0]
    for name, gradient in joined.gradients[2].items():  # the critic learns from the iteration's own alone
        assert not name.startswith("critic") or torch.equal(gradient, alone.gradients[2][name])


def test_without_a_critic_the_record_is_the_baseline():
    """p = 1/8 over 8 responses, so m = (2/8 + 1) / (2 + 4) = 5/24; then 8 more are wrong, and no advantage is left."""
    two = {"1 + 2 =": ["q <eos>", "1 <eos>", "2 <eos>", "3 <eos>"], "8 8": ["1 <eos>"] * 4}
    stage = Watched(below=0.3, loss=UNTRUNCATED, prior_strength=2.0, half_life_iterations=1.0, coef=1.0)
    wrong = {text: ["1 <eos>"] * 4 for text in two}
    module, recorder = fit(stage, two, wrong, critic=None, advantage=GroupAdvantage())
    [success] = stage.watched[0]
    policy = make_policy().double()
    own = log_likelihood(policy, success)
    weight = 0.5 * (1 - 5 / 24) * float((own.detach() + 2).exp())
    assert logged(recorder, "weight_mean")[1] == pytest.approx(weight)
    gradients = torch.autograd.grad(-weight * own / 2, list(policy.parameters()))
    for (name, _), gradient in zip(policy.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(module.gradients[1][f"policy.{name}"], gradient, atol=1e-12, rtol=1e-9)


class Breaks(TokenClipObjective):
    """A loss that is not finite in some calls, counted from 0."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.calls, self.call = calls, -1

    def __call__(self, *arguments: Any) -> Any:
        self.call += 1
        loss, stats = super().__call__(*arguments)
        return (loss * math.nan if self.call in self.calls else loss), stats


@pytest.mark.filterwarnings("ignore:The update after")
def test_what_is_skipped_is_not_kept_and_takes_the_replay_with_it(tmp_path: Path):
    turns = [{text: ["q <eos>"] for text in WRONG}, WRONG]
    stage = Watched(below=0.9, coef=1.0)
    settings = {"mini_batch_size": 2, "folder": tmp_path}
    module, _ = fit(stage, *turns, objective=Breaks(0, 2), **settings)  # the first update of both iterations
    plain, _ = fit(None, *turns, objective=Breaks(), **settings)
    assert [success.prompt.row for success in stage.watched[0]] == [2, 3]
    assert stage.records.sums.keys() == {("sums", 2), ("sums", 3)}
    assert stage.records.responses == pytest.approx(0.9 * 2 + 2)
    for name, gradient in plain.gradients[3].items():
        assert torch.equal(module.gradients[3][name], gradient), name


def test_while_the_critic_warms_up_successes_are_kept_and_none_is_replayed():
    turns = [{text: ["q <eos>"] for text in WRONG}, WRONG, WRONG]
    _, recorder = fit(Watched(below=0.9), *turns, critic_warmup=CriticWarmup(updates=2))
    assert logged(recorder, "stored") == [4, 4, 4]
    assert logged(recorder, "rows") == [None, None, 4]


def test_nothing_is_kept_where_the_policy_is_good():
    stage = SuccessReplay(coef=1.0)
    gradients = []
    for stages in ([stage], []):
        policy = make_policy()
        module = RecordingSPPO(policy, make_critic(zero=True), policy_optimizer=GroupOptimizer(lr=1e-2))
        batches = [make_batch(policy, list(WRONG)) for _ in range(3)]
        trainer = make_trainer(RolloutGeneration(Sampling(max_new_tokens=8)), EvenRows(), *stages)
        trainer.fit(module, loader(*batches))
        gradients.append(module.gradients)
    assert stage.store.stored == []
    for with_stage, without in zip(*gradients, strict=True):
        assert all(torch.equal(with_stage[name], gradient) for name, gradient in without.items())


def test_what_a_search_finds_is_learned_from_again():
    """Found responses keep what the search says of their density; the record is of the policy's own responses."""
    policy, stage, found = make_policy(), Watched(below=0.6), []

    class Looks(SearchHopeless):
        def process(self, batch: PromptBatch, trainer: Any, module: Any) -> None:
            super().process(batch, trainer, module)
            found.append(copy.copy(batch.found))

    module = RecordingSPPO(policy, make_critic(zero=True), policy_optimizer=STILL, critic_optimizer=STILL)
    recorder = Recorder()
    stages = [
        RolloutGeneration(Sampling(max_new_tokens=8)),
        HasQ(),
        Looks(BestOfN(n=40), below=1.0),
        stage,
        recorder,
    ]
    make_trainer(*stages, log_every_n_steps=1).fit(
        module, loader(*(make_batch(policy, list(WRONG)) for _ in range(2)))
    )
    assert len(found[0]) >= 2
    kept = {(each.prompt.key, tuple(each.response_ids)): each for each in stage.watched[0]}
    for each in found[0]:
        stored = kept[each.prompt.key, tuple(each.response_ids)]
        assert (stored.log_excess, [*stored.log_probs]) == (each.log_excess, each.log_probs)
        assert each.log_excess > 0
        assert stage.records.sums[each.prompt.key][0] == 0.0
    assert logged(recorder, "rows") == [0, len(stage.watched[0])]


def test_rounds_of_dynamic_sampling_replay_once(tmp_path: Path):
    class Counts(SuccessReplay):
        calls = 0

        def _values(self, *arguments: Any) -> Tensor:
            self.calls += 1
            return super()._values(*arguments)

    stage, script = Counts(below=1.0), Scripted(dict.fromkeys(range(4), BAD), rest=GOOD)
    stage.store.add([Success(Prompt("a b", "a", "words", 9), [3, 4], [3, 1], [-1.0, -1.0], 1.0)])
    recorder = fit_script(tmp_path, GivesSpares([9, 8, 10, 11]), script, stage, DynamicSampling())
    assert recorder.iterations[0]["rollout/sampling_rounds"] == 1
    assert stage.calls == recorder.iterations[0]["replay/rows"] == 1


def test_settings_and_order_are_checked():
    with pytest.raises(
        InputError, match="`SuccessReplay.below`=0 cannot be used; it must be above 0 and at most 1"
    ):
        SuccessReplay(below=0)
    with pytest.raises(InputError, match="`SuccessReplay.coef`=0 cannot be used; it must be above 0"):
        SuccessReplay(coef=0)
    stages = [RolloutGeneration(Sampling(max_new_tokens=2)), SuccessReplay(loss=Demonstrations()), HasQ()]
    with pytest.raises(InputError, match="SuccessReplay before HasQ"):
        make_trainer(*stages).fit(
            RecordingSPPO(make_policy(), make_critic()), loader(make_batch(make_policy(), ["1"]))
        )
