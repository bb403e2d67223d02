import random

import pytest

from sppo_lightning.batching import check_mini_batch_size, micro_batches, mini_batches, with_extra
from sppo_lightning.errors import InputError


@pytest.mark.parametrize(
    ("sequences", "size", "ranks", "expected"),
    [(512, None, 1, 512), (512, 32, 1, 32), (512, 512, 4, 512), (6, 1, 1, 1), (12, 4, 4, 4)],
)
def test_mini_batch_sizes_that_divide(sequences: int, size: int | None, ranks: int, expected: int):
    assert check_mini_batch_size(sequences, size, ranks) == expected


@pytest.mark.parametrize(
    ("sequences", "size", "ranks", "sentence"),
    [
        (512, 48, 1, "`mini_batch_size`=48 does not divide the 512 sequences of an iteration; use 32 or 64."),
        (512, 1000, 1, "`mini_batch_size`=1000 does not divide the 512 sequences of an iteration; use 256 or 512."),
        (512, 0, 1, "`mini_batch_size`=0 does not divide the 512 sequences of an iteration; use 1 or 2."),
        (512, -4, 1, "`mini_batch_size`=-4 does not divide the 512 sequences of an iteration; use 1 or 2."),
        (7, 3, 1, "`mini_batch_size`=3 does not divide the 7 sequences of an iteration; use 1 or 7."),
        (1, 3, 1, "`mini_batch_size`=3 does not divide the 1 sequences of an iteration; use 1."),
        (
            16,
            2,
            4,
            "`mini_batch_size`=2 does not divide the 16 sequences of an iteration evenly over 4 ranks; use 4 or 8.",
        ),
    ],
)
def test_mini_batch_sizes_that_do_not(sequences: int, size: int, ranks: int, sentence: str):
    with pytest.raises(InputError) as raised:
        check_mini_batch_size(sequences, size, ranks)
    assert str(raised.value) == sentence


def test_mini_batches_are_consecutive():
    assert [list(rows) for rows in mini_batches(6, 2)] == [[0, 1], [2, 3], [4, 5]]
    assert [list(rows) for rows in mini_batches(3, 3)] == [[0, 1, 2]]
    assert mini_batches(0, 2) == []


def test_extra_rows_go_where_the_last_of_their_prompt_is():
    # prompts 0, 0, 1, 2 in mini-batches of 2 rows; then one more response to 2, two to 0 and one to 1
    assert with_extra(mini_batches(4, 2), [0, 0, 1, 2, 2, 0, 0, 1]) == [[0, 1, 5, 6], [2, 3, 4, 7]]
    assert with_extra(mini_batches(4, 1), [0, 0, 1, 2, 0]) == [[0], [1, 4], [2], [3]]
    assert with_extra(mini_batches(4, 4), [0, 0, 1, 2]) == [[0, 1, 2, 3]]


def test_interleaved_ranks_share_each_mini_batch():
    # rank r of 2 holds the prompts r, r + 2, …; together their mini-batches are those of one rank
    for number, rows in enumerate(mini_batches(4, 2)):
        ours = sorted(row * 2 + rank for row in rows for rank in range(2))
        assert ours == list(mini_batches(8, 4)[number])


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([3, 5, 2], 100, [[1, 0, 2]]),
        ([3, 5, 2], 10, [[1], [0, 2]]),  # 2 × 5 + 2 would fit as well, and is a token of padding more
        ([3, 5, 2], 9, [[1], [0, 2]]),  # 2 × 5 would not fit, 2 × 3 does
        ([3, 5, 2], 1, [[1], [0], [2]]),  # a row longer than the budget stands alone
        ([4, 4, 4], 8, [[0], [1, 2]]),  # equal rows keep their order
        ([100, 1, 1, 1], 400, [[0], [1, 2, 3]]),  # another forward costs less than 297 tokens of padding
        ([50, 30, 30, 30], 400, [[0, 1, 2, 3]]),  # and more than 60
        ([0, 0], 1, [[0, 1]]),
        ([], 8, []),
    ],
)
def test_micro_batches(lengths: list[int], budget: int, expected: list[list[int]]):
    assert micro_batches(lengths, budget) == expected


def test_packed_rows_fill_the_budget_alike():
    assert micro_batches([3, 5, 2], 10, packed=True) == [[1, 0, 2]]
    assert micro_batches([3, 5, 2, 4], 8, packed=True) == [[1, 2], [3, 0]]
    assert micro_batches([9, 1], 8, packed=True) == [[0], [1]]  # the longer one stands alone
    assert micro_batches([], 8, packed=True) == []
    draw = random.Random(0)
    lengths = [draw.randint(1, 400) for _ in range(200)]
    groups = micro_batches(lengths, 4096, packed=True)
    assert sorted(i for group in groups for i in group) == list(range(200))
    filled = [sum(lengths[i] for i in group) for group in groups]
    assert len(groups) == -(-sum(lengths) // 4096)
    assert max(filled) <= 4096
    assert min(filled) > 0.98 * max(filled)


def test_padding_stays_small_on_lengths_as_reasoning_models_have_them():
    draw = random.Random(0)
    lengths = [150 + min(round(draw.lognormvariate(7.3, 0.8)), 8192) for _ in range(128)]
    groups = micro_batches(lengths, 16384)
    computed = sum(len(group) * lengths[group[0]] for group in groups)
    assert 1 - sum(lengths) / computed < 0.03
    assert len(groups) < 1.75 * sum(lengths) / 16384


def test_micro_batches_hold_each_row_once_within_the_budget():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 30))]
        groups = micro_batches(lengths, 64)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        assert all(len(group) * max(lengths[row] for row in group) <= 64 for group in groups)
        longest = [max(lengths[row] for row in group) for group in groups]
        assert longest == sorted(longest, reverse=True)
