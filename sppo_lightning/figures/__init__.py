"""Pictures of a run: what it learned over time, how well critic and policy foresee the outcome, who learns fastest.

Every function takes plain numbers and returns a `matplotlib.figure.Figure`, without pyplot and its global
state, so that they work in any thread and without a display.
"""

from sppo_lightning.figures.critic import calibration_figure, tail_effect_figure, value_against_reward
from sppo_lightning.figures.learning import learning_curve
from sppo_lightning.figures.policy import confidence_figure
from sppo_lightning.figures.race import Curve, race_figure

__all__ = [
    "Curve",
    "calibration_figure",
    "confidence_figure",
    "learning_curve",
    "race_figure",
    "tail_effect_figure",
    "value_against_reward",
]
