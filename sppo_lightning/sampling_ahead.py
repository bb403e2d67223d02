"""The responses to the next batch, sampled while this one is learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.engine import Response
from sppo_lightning.ranks import gather_objects, rank_and_ranks
from sppo_lightning.torch_settings import TorchSettings


@dataclass(frozen=True)
class Sampled:
    """The responses to one batch, in no order."""

    responses: list[Response]
    greedy: list[Response] | None  # one per prompt, where asked for
    seconds: float  # that sampling them took


class SamplingAhead:
    """At most one batch is sampled in a thread; `take` gives its responses to the batch that they belong to.

    The thread waits for an engine that samples elsewhere, so it takes no time from the trainer.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[str, int, int, int]] | None = None  # of the batch that is sampled, or has been
        self._sampled: Future[Sampled] | None = None
        self._taken: tuple[list[tuple[str, int, int, int]], Sampled] | None = None  # what is not learned from yet
        self._thread: ThreadPoolExecutor | None = None

    def start(self, batch: PromptBatch, sample: Callable[[PromptBatch], Sampled], settings: TorchSettings) -> None:
        """Run `sample` on a batch, with these settings; what was sampled before and not taken is lost."""
        self.wait()

        def work() -> Sampled:
            settings.adopt()
            with settings.precision():
                return sample(batch)

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling-ahead")
        self._keys, self._sampled = batch.keys, self._thread.submit(work)

    def take(self, batch: PromptBatch) -> Sampled | None:
        """The responses to `batch`, when they are there; None where another batch was sampled, or none."""
        if self._sampled is None or self._keys != batch.keys:
            return None
        sampled = self._sampled.result()
        self._taken, self._sampled = (batch.keys, sampled), None
        return sampled

    def learned(self) -> None:
        """Forget what was taken, which a checkpoint holds until then."""
        self._taken = None

    def wait(self) -> None:
        """Return when the engine has nothing to do; what it has sampled may still be taken."""
        if self._sampled is not None:
            self._sampled.result()

    def close(self) -> None:
        """Give up what is being sampled, whose engine has been closed."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = self._sampled = None

    def state_dict(self) -> dict[str, Any]:
        """What every rank has sampled ahead and not learned from, in plain types; a collective that waits."""
        own, ahead = None, self._taken
        if ahead is None and self._sampled is not None:
            ahead = self._keys or [], self._sampled.result()
        if ahead is not None:
            own = {"keys": [list(key) for key in ahead[0]], "sampled": dataclasses.asdict(ahead[1])}
        return {"sampled": gather_objects(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what this rank had; with nothing, where the number of ranks is another one."""
        rank, ranks = rank_and_ranks()
        own = state_dict["sampled"][rank] if len(state_dict["sampled"]) == ranks else None
        if own is None:
            return
        found, greedy = own["sampled"], own["sampled"]["greedy"]
        self._keys = [tuple(key) for key in own["keys"]]
        self._sampled = Future()
        self._sampled.set_result(
            Sampled(
                [Response(**response) for response in found["responses"]],
                None if greedy is None else [Response(**response) for response in greedy],
                found["seconds"],
            )
        )
