import pytest
import torch
from drawn import draw, lines_of

from sppo_lightning.figures import confidence_figure

BEFORE = torch.tensor([0.95, 0.75, 0.75, 0.25]), torch.tensor([1.0, 0.0, 1.0, 0.0])
NOW = torch.tensor([0.95, 0.95]), torch.tensor([1.0, 0.0])


def test_before_and_now_are_in_one_picture() -> None:
    pairs = {
        "before training": {"agreement": BEFORE},
        "iteration 8": {"agreement": NOW, "token_probability": BEFORE},
    }
    figure = confidence_figure(pairs)
    reliability, risk, other, other_risk = figure.axes
    assert [axes.get_title() for axes in (reliability, other)] == ["Agreement", "Token probability"]
    lines = lines_of(risk)
    assert list(lines) == [
        "before training, 4 problems: AURC 0.27, AUROC 0.88",
        "iteration 8, 2 problems: AURC 0.50, AUROC 0.50",
    ]
    before, now = lines.values()
    assert before == ([0.25, 0.5, 0.75, 1.0], pytest.approx([0.0, 0.25, 1 / 3, 0.5]))
    assert now == ([0.5, 1.0], pytest.approx([0.5, 0.5]))
    assert list(lines_of(other_risk)) == ["iteration 8, 4 responses: AURC 0.27, AUROC 0.88"]
    first, second = reliability.containers
    assert [bars.get_label() for bars in (first, second)] == [
        "before training, 4 problems: ECE 0.20",
        "iteration 8, 2 problems: ECE 0.45",
    ]
    assert first.lines[0].get_xydata().tolist() == [
        pytest.approx([0.25, 0.0]),
        pytest.approx([0.75, 0.5]),
        pytest.approx([0.95, 1.0]),
    ]
    colours = [bars.lines[0].get_color() for bars in (first, second, other.containers[0])]
    assert colours[1] == colours[2] != colours[0]  # a moment has one colour throughout
    assert draw(figure).startswith(b"\x89PNG")


def test_one_moment_and_one_kind() -> None:
    figure = confidence_figure({"this validation": {"token_probability": NOW}}, tokens="response")
    reliability, risk = figure.axes
    assert reliability.get_xlabel() == "mean probability of the response's tokens"
    assert len(reliability.containers) == len(lines_of(risk)) == 1
    assert draw(figure).startswith(b"\x89PNG")
