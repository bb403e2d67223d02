import multiprocessing

import pytest
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.math_verifier import MathVerifier
from sppo_lightning.errors import InputError
from sppo_lightning.verification import close_workers, verify_math


def prompts(*golds: str) -> list[Prompt]:
    return [Prompt(text="", gold=gold, dataset="sums", row=row) for row, gold in enumerate(golds)]


def test_scores_and_no_verdict():
    verifier = MathVerifier()
    responses = [r"\boxed{10080}", r"\boxed{41}", "forty-two", r"\boxed{3}"]
    assert verifier.score(prompts(r"10,\!080", "42", "42", r"\frac{1"), responses) == [1.0, 0.0, 0.0, None]
    assert verifier.counts["errors"] == 0


def test_a_timeout_scores_zero_and_is_counted():
    # fifty million factors, which no refusal knows of
    verifier = MathVerifier(timeout_seconds=1.0, workers=1)
    hostile = r"\boxed{\binom{100000000}{50000000}}"
    assert verifier.score(prompts(r"\pi", r"2\sqrt{2}"), [hostile, r"\boxed{\sqrt{8}}"]) == [0.0, 1.0]
    assert verifier.counts == {"timeouts": 1, "errors": 0}
    close_workers()


def test_teardown_and_an_exception_end_the_workers():
    verifier = MathVerifier()
    module, trainer = LightningModule(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for end in (
        lambda: verifier.teardown(trainer, module, "fit"),
        lambda: verifier.on_exception(trainer, module, KeyboardInterrupt()),
    ):
        assert verify_math([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"], timeout_seconds=20)[0].status == "correct"
        assert len(multiprocessing.active_children()) == 2
        end()
        assert multiprocessing.active_children() == []


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="timeout_seconds"):
        MathVerifier(timeout_seconds=0)
    with pytest.raises(InputError, match="workers"):
        MathVerifier(workers=0)
    with pytest.raises(InputError, match="numeric_tolerance"):
        MathVerifier(numeric_tolerance=1.0)


def test_a_tolerance_holds_in_the_trainer_and_in_the_workers():
    verifier = MathVerifier(numeric_tolerance=0.01, timeout_seconds=20)
    golds = prompts("100", "100", r"\pi", r"\pi")
    responses = [r"\boxed{101}", r"\boxed{102}", r"\boxed{3.14}", r"\boxed{3.2}"]
    assert verifier.score(golds, responses) == [1.0, 0.0, 1.0, 0.0]
    assert MathVerifier(timeout_seconds=20).score(golds, responses) == [0.0] * 4
    close_workers()


def test_data_loader_workers_leave_the_trainer_s_pool_alone():
    verify = [verify_math([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"], timeout_seconds=20)[0].status]
    verify += list(DataLoader(_Verifies(), num_workers=1, batch_size=None))
    verify += [verify_math([r"\boxed{\sqrt{18}}"], [r"3\sqrt{2}"], timeout_seconds=20)[0].status]
    assert verify == ["correct", "wrong", "correct"]
    close_workers()


class _Verifies:
    """A data set of one item, made in a process forked while the pool runs."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> str:
        return verify_math([r"\boxed{41}"], ["42"])[0].status
