import pytest

from sppo_lightning.verification.notation import Malformed, normalize, to_latex


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"$ \left( 3, \frac{\pi}{2} \right) $", r"(3;\frac{\pi}{2})"),
        (r"\dfrac 59", r"\frac{5}{9}"),
        (r"\frac9{19}", r"\frac{9}{19}"),
        (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"{3 \over 4}", r"\frac{3}{4}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\sqrt[3]2", r"\sqrt[3]{2}"),
        (r"\text{ east }", "east"),
        (r"11,\! 111", "11,111"),
        ("10{,}080", "10,080"),
        ("4210_5", "4210_{5}"),
        ("x^12", "x^{1}2"),  # as TeX reads it
        ("x⁴₂", "x^{4}_{2}"),
        ("2⅔", r"2\frac{2}{3}"),
        ("sqrt(2)/2pi", r"\sqrt{2}/2\pi"),
        ("a-{b-c}", "a-{b-c}"),
        ("2e + 3", "2×e+3"),
        ("]0,1[", "(0,1)"),
        ("1  2", "1 2"),
        (r"x \leq 2", "x≤2"),
        (r"x <= 2", "x≤2"),
        (r"90^{\circ}", "90°"),
        (r"\lbrace 1, 2 \rbrace", "⦃1;2⦄"),
        (r"3 \text{ or } 4", "3;4"),
        (r"\boxed{\boxed{42}}.", "42"),
        (r"\text{The answer is } 42", "42"),
        ("３ − ½", r"3-\frac{1}{2}"),
        (r"\sin x \cdot \cos x", r"\sin(x)×\cos x"),
    ],
)
def test_normalize(answer: str, expected: str):
    assert normalize(answer) == expected


@pytest.mark.parametrize("text", [r"\frac{1", r"\frac{1}", r"\sqrt", r"\sqrt[3", r"3\binom{5"])
def test_what_breaks_off_is_malformed(text: str):
    with pytest.raises(Malformed):
        normalize(text)


def test_a_parser_reads_exact_numbers_and_radians():
    assert to_latex("2.50x≤1,000") == r"\frac{250}{100}x\le 1000"
    assert to_latex(r"\sin 30°×2") == r"\sin \frac{30\pi}{180}\cdot 2"
