import random
import time

import pytest

from sppo_lightning.verification.statements import find_statements


def verdicts(text: str) -> list[bool]:
    return [statement.holds for statement in find_statements(text)]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "3 × 4 + 2 = 14",
            "12/5 = 2.4",
            "3 x 4 = 12",
            "3x4 = 12",
            "2*3=6",
            "7 − 10 = -3",
            "2(3 + 4) = 14",
            "3 + 4 == 7",
        ),
        *("2^10 = 1024", "2**10 = 1024", "2 ** 3 = 8", "5² + 12² = 13²", "2^-1 = 0.5", "-2^2 = -4", "5! = 120"),
        *("1,200 + 300 = 1,500", r"1{,}200 + 300 = 1{,}500", "$3.50 + $2 = $5.50", "20% × 50 = 10", "3/4 = 75%"),
        *(
            r"$\frac{3}{4} \times 8 = 6$",
            r"12 \div 4 = 3",
            r"\(3 \cdot 4 = 12\)",
            r"2\left(3+4\right) = 14",
            r"2^{3} = 8",
        ),
        *(r"30^\circ + 60^\circ = 90^\circ", "30° + 60° = 90°", r"\[ \frac{\$15 + \$5}{2} = \$10 \]"),
        *(
            r"3 + 4 = \boxed{7}",
            r"\boxed{3 + 4 = 7}",
            "**3 + 4 = 7**",
            "**3 + 4** = 7",
            r"3 + 4 = 7 \text{ apples}",
        ),
        *("We add 3 + 4 = 7 apples.", "(since 3 + 4 = 7)", "3 + 4 = 7 (since it is)", "the total is -3 + 5 = 2"),
        *(
            "x = 3 + 4 = 7",
            "f(2) = 2*2 + 1 = 5",
            "P(A) = 3/6 = 1/2",
            "x + 3 = 10 - 2 = 8",
            "16 - 3 = <<16-3=13>>13 eggs",
        ),
        *("1/3 ≈ 0.33", r"2/3 \approx 0.67", "0.33 ≈ 1/3", "1234 × 1 ≈ 1200", "1/3 ≈ 33%", "2/4 ≈ 0.5"),
    ],
)
def test_what_holds(text: str):
    assert verdicts(text) == [True]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "3 × 4 + 2 = 15",
            "1/3 = 0.33",
            "2/3 ≈ 0.66",
            "0.1 + 0.2 = 0.4",
            "1,200 + 300 = 1,600",
            r"\frac{3}{4} = 0.7",
        ),
        *(
            "-3 + 5 = 8",
            "x = 3 + 4 = 8",
            "20% × 50 = 11",
            "3 + 4 = 8!",
            "(so 3 + 4 = 8)",
            "2^10 = 1000",
            "10/3 ≈ 4",
        ),
    ],
)
def test_what_does_not_hold(text: str):
    assert verdicts(text) == [False]


def test_every_link_of_a_chain():
    assert verdicts("2 + 3 = 5 = 10/2 = 4") == [True, True, False]
    assert verdicts("2 + 3 = 5 × 4 = 20") == [False, True]  # read as it is written
    assert verdicts("3 + 4 = 7, 8 + 1 = 9 and 2 × 2 = 5") == [True, True, False]


@pytest.mark.parametrize(
    "text",
    [
        # letters, and what stands beside them
        *(
            "2x + 3 = 7",
            "x + 3 = 7",
            "x - 3 = 2",
            "3 + 4 = 5x",
            "3 + 4 = 5 x",
            "3x = 12 + 1",
            "a_1 + 2 = 5",
            "f(3, 4) + 2 = 9",
        ),
        *("f'(3) + 2 = 7", "2 apples + 3 apples = 6 apples", "y = 3 + 4x = 7 + 2", "1e-7 + 1 = 2", "0x10 + 1 = 17"),
        *(
            r"\sqrt{16} + 2 = 6",
            r"\binom{5}{2} = 10 + 1",
            r"\log_2(8) + 1 = 4",
            "|−3| + 2 = 5",
            "5 2/3 + 1 = 7",
            "4^(1/2) = 2",
        ),
        # words that compute, or that more than the number belongs to
        *(
            "17 mod 5 = 2 + 0",
            "7 + 10 = 2 (mod 5)",
            "20% of 50 + 10 = 20",
            "3 + 4 = 7 million",
            "5 choose 2 = 5·4/2",
        ),
        *(
            "17 / 5 = 3 remainder 2",
            "90 / 60 = 1 hour 30 minutes",
            "the sum of the first 10 = 5 × 11",
            "10/3 = 3.3 (rounded)",
        ),
        *("twice 3 + 4 = 10", "the mean of 3, 4, 5 = 12/3", "in the ratio 3 : 4 = 6/8"),
        "Is 3 + 4 = 8?",
        # other notations
        *(
            "1,5 + 2 = 3,5",
            "2:30 + 1 = 3:30",
            "1 + 2 + ... + 10 = 55",
            "1/3 = 0.333...",
            "12 + 5 ≡ 2 + 5",
            "٣ + ٤ = ٨",
            "３+４=８",
        ),
        *("3 +\n4 + 1 = 8", "2\n+ 3 + 1 = 6", "2\n- 3 + 1 = 0", "3 + 4 =", "= 3 + 4", "3 + 4 = ?", "6/2(1+2) = 1"),
        # read otherwise it holds
        *("3/4 × 100 = 75%", "3 + 4 = 7!"),
        # nothing is computed
        *("5 = 5", "5 = 6", "-5 = 5", "2 + 2 = 2 + 2", "2 + 3 = (3) + 2.0", "50% = 0.5", "3.14159 ≈ 3.14"),
        # no value within the bounds
        *(
            "10/0 = 1",
            "0^0 = 1 + 0",
            "9**9**9 = 1 + 1",
            "9^9^9^9 = 3 + 4",
            "1000000! = 2 × 1",
            "10^{10^{10}} = 1 + 0",
        ),
    ],
)
def test_what_is_not_judged(text: str):
    assert verdicts(text) == []


def test_the_same_statement_in_another_spelling_has_the_same_key():
    keys = [
        [s.key for s in find_statements(text)]
        for text in ("2+3=5", "3 + 2.0 = (5)", "5 = 2 + 3", r"\$2 + \$3 = \$5")
    ]
    assert keys == [keys[0]] * 4
    assert len(keys[0]) == 1
    assert find_statements("2 + 4 = 6")[0].key != keys[0][0]


def test_random_sums_in_prose():
    rng = random.Random(4)
    spelled = {"+": ["+", " + "], "-": [" - ", " − ", "-"], "*": [" × ", "*", r" \times ", " x "]}
    for _ in range(300):
        a, b, c = (rng.randint(1, 9999) for _ in range(3))
        first, second = rng.choice("+-*"), rng.choice("+-*")
        expected = eval(f"{a}{first}{b}{second}{c}")
        claim = expected if (right := rng.random() < 0.5) else expected + rng.choice([-10, -1, 1, 10])
        digits = "," if rng.random() < 0.5 else ""
        sides = [format(n, digits) for n in (a, b, c, claim)]
        text = sides[0] + rng.choice(spelled[first]) + sides[1] + rng.choice(spelled[second]) + sides[2]
        before, after = rng.choice(
            [("", ""), ("so we get ", " apples."), ("$", "$"), ("(", ")"), ("x = ", "; next")]
        )
        assert verdicts(f"{before}{text} = {sides[3]}{after}") == [right], text


HOSTILE = {
    "digits": "9" * 10**6 + " = 1 + 1",
    "digits that are read": "1 + 1 = " + "9" * 3900,
    "ten thousand parentheses": "(" * 10_000 + "1 + 1" + ")" * 10_000 + " = 2",
    "parentheses that are read": "(" * 1900 + "1 + 1" + ")" * 1900 + " = 2",
    "closing": "(1 + 1 = 2 +" + ")" * 3900,
    "tower": "9**" * 1300 + "9",
    "tower with a relation": "9^" * 1900 + "9 = 1 + 1",
    "signs": "-" * 3900 + "1 = 1 + 1",
    "thousands": "1" + ",000" * 980 + "0 = 1 + 1",
    "relations": "=" * 4000,
    "factorials": "1" + "!" * 3900 + " = 1",
    "huge factorial": "99999999! = 1 + 1",
    "fractions": r"\frac" * 790 + "= 1",
    "texts": r"\text{" * 650 + "=",
    "large powers": f"({'9' * 38} * {'9' * 38})^6 = 1",
    "denominators": "+".join(f"1/{n}" for n in range(2, 60)) + " = 1",
    "invalid unicode": "\ud800 + 1 = 2 \x00 1 + 1 = \udfff",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_read_in_seconds(name: str):
    start = time.perf_counter()
    assert verdicts(HOSTILE[name]) == []
    assert time.perf_counter() - start < 5


def test_no_text_raises():
    rng = random.Random(5)
    pieces = [*"0123456789+-*/=()" * 3, *" \n.,{}^!%≈x$&:'…²−½٣", "**", "by", "\\\\"]
    pieces += [r"\frac", r"\text{a}", r"\sqrt", r"\approx"]
    start = time.perf_counter()
    found = sum(len(find_statements("".join(rng.choices(pieces, k=rng.randint(3, 60))))) for _ in range(3000))
    assert found > 0
    assert time.perf_counter() - start < 5
