"""An engine in a process of its own, which samples while the trainer does something else."""

from __future__ import annotations

import copy
import dataclasses
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling, run_seed, seeded
from sppo_lightning.engines.whole_copy import WholeCopy
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.quantized import quantized_names
from sppo_lightning.models.sharding import is_sharded
from sppo_lightning.torch_settings import TorchSettings


class ProcessEngine(Engine):
    """Any engine that samples in this process, in another one.

    The weights lie in memory that both processes see, and a new version is one copy into it: no file, no message.
    On CUDA it lies on the device, and the other process shares the device with this one.

    Args:
        engine: What samples there; a copy of it is sent.
        threads: CPU threads of the process; those of this one where left out.
    """

    samples_elsewhere: ClassVar[bool] = True

    def __init__(self, engine: Engine, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"`threads`={threads} of ProcessEngine leaves nothing to sample with; use 1 or more.")
        if engine.samples_elsewhere:
            raise InputError(
                f"`engine`={type(engine).__name__} of ProcessEngine samples elsewhere already; use it as it is."
            )
        self.engine = engine
        self.threads = threads
        self._copy: WholeCopy | None = None  # of a sharded or 4-bit policy, with the shared memory for weights
        self._weights: _SharedWeights | None = None
        self._process: Any = None
        self._connection: Connection | None = None

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Copy the weights to where the process reads them; it must have nothing to do."""
        if self._process is None:
            self._start()
        if policy is not self.policy or self._weights is None:
            self._copy = WholeCopy(policy) if is_sharded(policy) or quantized_names(policy) else None
            self._weights = _SharedWeights(policy if self._copy is None else self._copy.policy)
            if self._copy is not None:
                self._weights.fill(self._copy.policy)
            self._send("policy", self._weights)
        if self._copy is None:
            self._weights.copy_from(policy)
        else:
            self._copy.follow()
        self._weights.written()
        self.policy, self.version = policy, version

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """The responses, as the process sends them; see `Engine.stream`."""
        if self.policy is None:
            raise RuntimeError("ProcessEngine.stream was called before update_weights.")
        settings = TorchSettings.here(self.policy.device)
        settings = dataclasses.replace(settings, threads=self.threads or settings.threads)
        self._send("stream", _Request(_without_text(batch), sampling, self.version, run_seed(), settings))
        answers = self._answers()
        try:
            for answer in answers:  # noqa: UP028 (which would end `answers` where the reader stops)
                yield answer
        finally:
            for _ in answers:  # the next request must not meet this one's responses
                pass

    def close(self) -> None:
        """End the process, whatever it does."""
        process, connection = self._process, self._connection
        self._process = self._connection = self._weights = self._copy = None
        if process is not None:
            process.kill()  # first, for a thread that waits for its responses to see that there are none
            process.join()
        if connection is not None:
            connection.close()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        try:
            self._process = context.Process(target=_serve, args=(theirs, self.engine), daemon=True)
            self._process.start()
        except (AttributeError, TypeError, RuntimeError) as error:
            self._process = None
            raise InputError(
                f"`engine`={type(self.engine).__name__} cannot be sent to a process of its own ({error}); use "
                "HFEngine, or `prefetch: 0`."
            ) from error
        theirs.close()

    def _send(self, kind: str, value: Any) -> None:
        try:
            self._open().send((kind, value))
        except OSError as error:
            raise self._death() from error

    def _answers(self) -> Iterator[Response]:
        """The responses to one request; raises what went wrong in the process."""
        while True:
            try:
                found = self._open().recv()
            except (EOFError, OSError) as error:
                raise self._death() from error
            if isinstance(found, _Failure):
                raise InputError(found.text) if found.is_input_error else RuntimeError(found.text)
            if found is None:
                return
            yield found

    def _open(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("The process that samples was closed.")
        return self._connection

    def _death(self) -> RuntimeError:
        process = self._process
        if process is None:
            return RuntimeError("The process that samples was closed.")
        process.join(5.0)
        code = process.exitcode
        self.close()
        why = "; it was killed, as happens where memory runs out" if code == -signal.SIGKILL else ""
        return RuntimeError(f"The process that samples has ended with exit code {code}{why}.")


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is asked of the process."""

    batch: PromptBatch
    sampling: Sampling
    version: int
    seed: int
    settings: TorchSettings


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What went wrong there."""

    text: str
    is_input_error: bool


class _SharedWeights:
    """A policy whose parameters lie end to end in one shared tensor per dtype and device.

    One tensor, because each takes an open file to be shared.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        parameters = list(policy.parameters())
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for key in {(p.dtype, p.device) for p in parameters}:
            size = sum(p.numel() for p in parameters if (p.dtype, p.device) == key)
            self.flat[key] = torch.empty(size, dtype=key[0], device=key[1]).share_memory_()
        self.places = [(p.dtype, p.device, p.shape) for p in parameters]
        # empty parameters in the copy, the same one where two modules share theirs, so nothing is held twice
        hollow: dict[int, Any] = {id(p): nn.Parameter(p.detach().new_empty(0), False) for p in parameters}
        self.policy = copy.deepcopy(policy, hollow)
        for module in self.policy.modules():
            module.__dict__.pop("forward", None)  # that recomputes activations, for gradients that are not wanted

    def views(self) -> Iterator[Tensor]:
        """Each parameter's part of the shared memory."""
        used = dict.fromkeys(self.flat, 0)
        for dtype, device, shape in self.places:
            start = used[dtype, device]
            used[dtype, device] += shape.numel()
            yield self.flat[dtype, device][start : used[dtype, device]].view(shape)

    @torch.no_grad()
    def copy_from(self, policy: CausalLMPolicy) -> None:
        """The present weights of `policy`."""
        for view, parameter in zip(self.views(), policy.parameters(), strict=True):
            view.copy_(parameter)

    def written(self) -> None:
        """Wait until all is there: the other process does not know of this one's streams."""
        if any(device.type == "cuda" for _, device in self.flat):
            torch.cuda.synchronize()

    def fill(self, policy: CausalLMPolicy) -> None:
        """Make the shared memory the weights of `policy`."""
        for parameter, view in zip(policy.parameters(), self.views(), strict=True):
            parameter.data = view

    def filled(self) -> CausalLMPolicy:
        """The policy, with the shared memory as its weights; in the process that samples."""
        self.fill(self.policy)
        return self.policy


def _without_text(batch: PromptBatch) -> PromptBatch:
    """What an engine needs of a batch: ids, and what keys the noise."""
    prompts = [Prompt("", "", prompt.dataset, prompt.row) for prompt in batch.prompts]
    return PromptBatch(prompts, batch.token_ids, batch.visits, batch.first_samples)


def _serve(connection: Connection, engine: Engine) -> None:
    """Answer requests until the other side closes; signals to the whole group are for the trainer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    policy: CausalLMPolicy | None = None
    while True:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            return
        if kind == "policy":
            policy = value.filled()
            continue
        assert policy is not None
        try:
            _answer(connection, engine, policy, value)
        except InputError as error:
            connection.send(_Failure(str(error), True))
        except Exception:  # whatever it is, the trainer waits for an answer, and raises it
            connection.send(_Failure(f"Sampling failed in its process:\n{traceback.format_exc()}", False))


def _answer(connection: Connection, engine: Engine, policy: CausalLMPolicy, request: _Request) -> None:
    request.settings.adopt(new_process=True)
    engine.update_weights(policy, request.version)
    with seeded(request.seed), request.settings.precision():
        for response in engine.stream(request.batch, request.sampling):
            connection.send(response)
    connection.send(None)
