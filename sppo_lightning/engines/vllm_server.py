"""Sampling with vLLM servers, on other GPUs or other machines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.http import JSONClient, Refused, Unreachable
from sppo_lightning.engines.sampling import Sampling, run_seed
from sppo_lightning.engines.stop_strings import StopStrings
from sppo_lightning.engines.vllm_requests import check_answer, cut_at_stop, request_settings, seed_of
from sppo_lightning.engines.weight_transfer import FolderTransfer, WeightTransfer, fingerprint
from sppo_lightning.engines.whole_copy import WholeCopy
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.sharding import is_sharded
from sppo_lightning.ranks import gather_objects, rank_and_ranks

_POLL_SECONDS = 1.0  # between two looks at a server that is starting
_LOOK_SECONDS = 10.0  # without any answer, before a look at servers that are at work; and for it
_KNOCK_SECONDS = 2.0  # for a server that was left out, to answer again


class VLLMServerEngine(Engine):
    """Spreads requests over vLLM servers, and sends them the weights after each update.

    The first time, it prepares what a server starts with and waits for all of them; it prints the command. Each
    response says which weights sampled it, and one of other weights than the present ones ends the run. A server
    that stops answering is left out with a warning, and its requests go to the others; when it answers again, it
    takes part from the next update on.

    Args:
        servers: Addresses.
        transfer: How weights get there; through a folder by default.
        max_requests: Most requests under way at once, over all servers.
        timeout_seconds: For the answer to one request.
        start_timeout_seconds: For all servers to be there.
        retries: How often a request is repeated that got no answer.
    """

    samples_elsewhere: ClassVar[bool] = True

    def __init__(
        self,
        servers: Sequence[str] = ("http://127.0.0.1:8000",),
        transfer: WeightTransfer | None = None,
        max_requests: int = 256,
        timeout_seconds: float = 600.0,
        start_timeout_seconds: float = 600.0,
        retries: int = 3,
    ) -> None:
        if not servers:
            raise InputError("`servers`=[] of VLLMServerEngine leaves nobody to ask; name one or more.")
        if max_requests < 1:
            raise InputError(f"`max_requests`={max_requests} of VLLMServerEngine asks nothing; use 1 or more.")
        self.urls = [url.rstrip("/") for url in servers]
        self.timeout_seconds = timeout_seconds
        self.servers = [JSONClient(url, timeout_seconds) for url in self.urls]  # those that are asked at present
        self.transfer = transfer or FolderTransfer()
        self.max_requests = max_requests
        self.start_timeout_seconds = start_timeout_seconds
        self.retries = retries
        self._copy: WholeCopy | None = None  # of a sharded policy
        self._sent: Any = None  # the fingerprint of the weights that the servers have
        self._label = ""  # what the servers call them
        self._transfers = 0

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Send the weights, unless the servers have them; a collective, of which rank 0 does the sending."""
        rank, _ = rank_and_ranks()
        sent = self._whole(policy, rank)
        if rank == 0:
            if self.policy is None:
                self._wait_for_servers(self.transfer.prepare(sent))
            weights, returned = fingerprint(sent), self._returned()
            self.servers += returned
            if weights != self._sent or returned:
                self._transfers += 1
                self._label = f"{version}.{self._transfers}"
                self._send(sent)
                self._sent = weights
        self._label, urls = gather_objects((self._label, [server.url for server in self.servers]))[0]
        known = {server.url: server for server in self.servers}
        self.servers = [known.get(url) or JSONClient(url, self.timeout_seconds) for url in urls]
        self.policy, self.version = policy, version

    def _whole(self, policy: CausalLMPolicy, rank: int) -> CausalLMPolicy:
        """What rank 0 sends: the policy, or a copy of a sharded one in the machine's memory; then a collective."""
        if not is_sharded(policy):
            return policy
        if self._copy is None:
            self._copy = WholeCopy(policy, "meta" if rank else "cpu")
        self._copy.follow()
        return self._copy.policy

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """The responses as they finish; see `Engine.stream`."""
        if self.policy is None:
            raise RuntimeError("VLLMServerEngine.stream was called before update_weights.")
        requests = [(i, s) for i in range(len(batch)) for s in range(sampling.samples_per_prompt)]
        seed, settings = run_seed(), request_settings(sampling, self.policy.eos_token_ids)
        stop = StopStrings(self.policy.tokenizer, sampling.stop)
        finished: SimpleQueue[Future[Response]] = SimpleQueue()  # in the order in which they finish
        with ThreadPoolExecutor(min(self.max_requests, max(len(requests), 1))) as threads:
            asked = [
                threads.submit(
                    self._respond, number, place, batch, {**settings, "seed": seed_of(seed, batch, place)}
                )
                for number, place in enumerate(requests)
            ]
            try:
                for future in asked:
                    future.add_done_callback(finished.put)
                for _ in asked:
                    yield cut_at_stop(self._next(finished).result(), stop)
            finally:
                threads.shutdown(cancel_futures=True)

    def _next(self, finished: SimpleQueue[Future[Response]]) -> Future[Response]:
        """The next request that has been answered; meanwhile, servers that will never answer are found out."""
        while True:
            try:
                return finished.get(timeout=_LOOK_SECONDS)
            except Empty:
                for server in self.servers:
                    self._answers(server)

    def _wait_for_servers(self, command: str) -> None:
        deadline = time.monotonic() + self.start_timeout_seconds
        for server in self.servers:
            announced = False
            while True:
                try:
                    _health(server.url, _LOOK_SECONDS)
                    break
                except Unreachable as error:
                    if time.monotonic() > deadline:
                        raise InputError(
                            f"`servers`: {error}, and `start_timeout_seconds`={self.start_timeout_seconds:g} have "
                            f"passed; start it: {command}"
                        ) from error
                    if not announced:
                        rank_zero_info(
                            f"Waiting for a vLLM server at {server.url}. The command that starts one:\n{command}"
                        )
                        announced = True
                    time.sleep(_POLL_SECONDS)

    def _send(self, policy: CausalLMPolicy) -> None:
        try:
            self.transfer.send(policy, [server for server in self.servers if self._answers(server)], self._label)
        except Refused as error:
            raise InputError(
                f"A server does not take the weights ({error}); start it with VLLM_SERVER_DEV_MODE=1."
            ) from error

    def _returned(self) -> list[JSONClient]:
        """Servers that were left out and answer again."""
        asked, returned = {server.url for server in self.servers}, []
        for url in self.urls:
            if url not in asked:
                with suppress(Unreachable):
                    _health(url, _KNOCK_SECONDS)
                    returned.append(JSONClient(url, self.timeout_seconds))
                    rank_zero_info(f"The vLLM server at {url} answers again and takes part from now on.")
        return returned

    def _answers(self, server: JSONClient) -> bool:
        """Whether a server is there; it is left out from now on where not, as long as another one is."""
        try:
            _health(server.url, _LOOK_SECONDS)
            return True
        except Unreachable as error:
            self._leave_out(server, error)
            return False

    def _leave_out(self, server: JSONClient, why: Exception) -> None:
        before, left = len(self.servers), [other for other in self.servers if other is not server]
        if left:
            self.servers = left
        server.close()  # what still waits for it goes to another one
        if not left:
            raise RuntimeError(f"No vLLM server is left: {why}.") from why
        if len(left) < before:
            rank_zero_warn(f"A vLLM server is left out from now on, {len(left)} go on: {why}.")

    def _respond(
        self, number: int, place: tuple[int, int], batch: PromptBatch, settings: dict[str, Any]
    ) -> Response:
        """The response to one request, from whichever server answers."""
        body = {"token_ids": batch.token_ids[place[0]], "sampling_params": settings}
        for attempt in range(self.retries + 1):
            server = self.servers[(number + attempt) % len(self.servers)]
            try:
                answer = server.post("/inference/v1/generate", body)
            except Refused as error:
                raise InputError(f"A vLLM server refuses a request: {error}.") from error
            except Unreachable as error:
                if attempt == self.retries:
                    raise RuntimeError(f"A request got no answer in {attempt + 1} tries: {error}.") from error
                if len(self.servers) > 1 and server in self.servers:
                    self._leave_out(server, error)
                else:
                    time.sleep(0.5 * 2**attempt)
                continue
            return self._checked(answer, place, server.url)
        raise AssertionError  # the last try returns or raises

    def _checked(self, answer: Any, place: tuple[int, int], url: str) -> Response:
        """The response in a server's answer; raises for one that is not whole, or of other weights."""
        try:
            [choice] = answer["choices"]
            ids, reason = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
            log_probs = [float(each["logprob"]) for each in choice["logprobs"]["content"]]
            labels = {span["version"] for span in choice["weight_versions"]}
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"{url} answers without {error}: {str(answer)[:300]}") from error
        check_answer(url, ids, log_probs, reason)
        if labels != {self._label}:
            raise RuntimeError(
                f"{url} sampled from the weights {sorted(labels)}, where {self._label!r} are the present ones; it "
                "may serve another run too."
            )
        return Response(*place, ids, log_probs, reason, self.version)


def _health(url: str, timeout_seconds: float) -> None:
    """Raise `Unreachable` for a server that is not well; on a connection of its own, others may be busy."""
    JSONClient(url, timeout_seconds).get("/health")
