"""Scoring code that verifiers call; nothing here imports torch."""

from sppo_lightning.verification.code import TestReport, run_tests
from sppo_lightning.verification.math import MathVerdict, close_workers, verify_math

__all__ = ["MathVerdict", "TestReport", "close_workers", "run_tests", "verify_math"]
