"""Scoring code that verifiers call; nothing here imports torch."""

from sppo_lightning.verification.math import MathVerdict, close_workers, verify_math

__all__ = ["MathVerdict", "close_workers", "verify_math"]
