"""One, two or three processes that share the rows unevenly: the same metrics to the last bit, on each of them."""

import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sppo_lightning.batch import Prompt, Rollouts, Scores
from sppo_lightning.confidence import PolicyConfidence
from sppo_lightning.evaluation import Evaluation
from sppo_lightning.models import TinyPolicy

NAN = math.nan
POLICY = TinyPolicy(r"\boxed{ } 1 2 3 4 5 7 9 no idea")
# row by row: the question, and (answer, reward) of the two responses; "a" stands three times, as AIME24's do
HARD = [
    ("b", ("7", 0.0), ("", 0.0)),
    ("a", ("4", 1.0), ("4", 1.0)),
    ("a", ("3", 0.0), ("5", 0.0)),  # before the row above where ranks are simply put together, of two
    ("a", ("3", 0.0), ("1", NAN)),  # or of three
    ("c", ("", 0.0), ("", 0.0)),
]
EASY = [("d", ("2", 1.0), ("2", 1.0)), ("e", ("9", 0.0), ("2", 1.0))]
VALUES = {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.75, "e": 0.875}


def rollouts_of(table: list, rows: list[int]) -> Rollouts:
    prompts = [Prompt(table[row][0], "1", "sums", row) for row in rows for _ in range(2)]
    told = [pair for row in rows for pair in table[row][1:]]
    responses = [rf"\boxed{{ {answer} }}" if answer else "no idea" for answer, _ in told]
    tokens = POLICY.tokenizer(responses, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"].float()
    nats = torch.tensor([[1.0 + row, 2.0 + i, 1.0] for row in rows for i in range(2)])
    n = len(prompts)
    made = Rollouts(
        prompts=prompts,
        prompt_index=torch.arange(len(rows)).repeat_interleave(2),
        prompt_ids=torch.ones(n, 1, dtype=torch.long),
        prompt_mask=torch.ones(n, 1),
        response_ids=tokens["input_ids"],
        response_mask=mask,
        sampled_log_probs=-mask * nats[:, : mask.shape[1]],
        responses=responses,
        finish_reasons=["stop"] * n,
        temperature=1.0,
        policy_versions=torch.zeros(2 * len(rows), dtype=torch.long),
    )
    made.scores["table"] = Scores(torch.tensor([reward for _, reward in told]), 1.0, "outcome")
    return made


def evaluate(rank: int, ranks: int) -> Evaluation:
    """This rank's rows as `PromptLoader` shares them, in batches of 4 over all ranks."""
    evaluation = Evaluation()
    evaluation.confidence = PolicyConfidence(POLICY)
    for index, table in enumerate((HARD, EASY)):
        for start in range(0, len(table), 4):
            rows = list(range(len(table)))[start : start + 4][rank::ranks]
            if rows:  # as `PolicyModule` does where a rank's share is empty
                rollouts = rollouts_of(table, rows)
                values = torch.tensor([VALUES[prompt.text] for prompt in rollouts.prompts])
                evaluation.update(index, rollouts, values)
    return evaluation


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    evaluation = evaluate(rank, ranks)
    metrics = evaluation.report(["hard", "easy"])
    rates = {name: table.pass_rates.tolist() for name, table in evaluation.last_problems.items()}
    (folder / f"{rank}.json").write_text(json.dumps([metrics, rates]))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_changes_nothing(ranks: int, tmp_path: Path):
    mp.start_processes(work, (ranks, tmp_path), nprocs=ranks, start_method="fork")
    alone = evaluate(0, 1)
    expected = alone.report(["hard", "easy"])
    rates = {name: table.pass_rates.tolist() for name, table in alone.last_problems.items()}
    for rank in range(ranks):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected, rates]


def test_what_they_agree_on_by_hand():
    metrics = evaluate(0, 1).report(["hard", "easy"])
    # a: 4, 4, 3, 5, 3 without the one that has no verdict; 4 and 3 tie, and 4 came first
    assert metrics["val/hard/maj@5"] == pytest.approx(1 / 3)
    assert metrics["val/hard/avg@5"] == pytest.approx((2 / 5 + 0 + 0) / 3)
    assert metrics["val/hard/pass@5"] == pytest.approx(1 / 3)
    # e: 9 and 2 tie, and 9 came first
    assert metrics["val/easy/maj@2"] == pytest.approx((1 + 0) / 2)
    assert metrics["val/easy/avg@2"] == pytest.approx((1 + 0.5) / 2)
    assert metrics["val/all/maj@5"] == pytest.approx((1 + 0 + 0 + 1 + 0) / 5)
    assert metrics["val/all/critic_brier"] == pytest.approx((0.1**2 + 0.25**2 + 0.125**2 + 0.25**2 + 0.375**2) / 5)


def test_what_they_agree_on_of_the_policys_confidence_by_hand():
    evaluation = evaluate(0, 1)
    metrics = evaluation.report(["hard", "easy"])
    assert evaluation.confidence is not None
    shares, rewards = evaluation.confidence.pairs(evaluation.last_problems["all"])["agreement"]
    # by the first row of each problem: b, a, c, d, e
    assert shares.tolist() == [1 / 2, 2 / 5, 0.0, 1.0, 1 / 2]
    assert rewards.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert metrics["val/all/agreement_mean"] == pytest.approx(2.4 / 5)
    assert metrics["val/all/agreement_accuracy"] == metrics["val/all/maj@5"] == pytest.approx(2 / 5)
    # d, then b and e in either order, then a, then c: 0, 1, 2, 2 and 3 of them wrong
    assert metrics["val/all/agreement_aurc"] == pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 4 + 3 / 5) / 5)
    # the answer is the second token, of log-probability −2 or −3 for the first or second response of a row
    first, second = math.exp(-2), math.exp(-3)
    assert metrics["val/easy/token_probability_mean"] == pytest.approx((2 * first + 2 * second) / 4)
    assert metrics["val/hard/token_probability_mean"] == pytest.approx((4 * first + 2 * second) / 6)
