"""Sampling with vLLM in the trainer's process, on the trainer's device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from packaging.version import Version

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling, run_seed
from sppo_lightning.engines.stop_strings import StopStrings
from sppo_lightning.engines.vllm_requests import check_answer, cut_at_stop, request_settings, seed_of
from sppo_lightning.engines.weight_transfer import fingerprint, served_weights, write_description
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy

_OLDEST = Version("0.32")
_SETTINGS = {  # of the process, while vLLM starts
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process of its own
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's
}


class VLLMEngine(Engine):
    """vLLM in the trainer's process: one engine per rank, with the rank's device and all of the model.

    vLLM starts with the first weights. New weights go from memory to memory. On CUDA vLLM sleeps while nothing is
    sampled, and its weights and its cache of keys and values are the trainer's memory then.

    Args:
        gpu_memory_utilization: vLLM's share of the device's memory while it samples; on a CPU, of the machine's.
        max_model_len: Longest prompt and response together, in tokens; the model's own limit where left out.
        vllm: More arguments of `vllm.LLM`, by vLLM's names.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        vllm: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < gpu_memory_utilization < 1:
            raise InputError(
                f"`gpu_memory_utilization`={gpu_memory_utilization} of VLLMEngine must be above 0 and below 1."
            )
        if find_spec("vllm") is None:
            raise InputError(
                "`engine`=VLLMEngine needs vLLM, which is not installed; install the extra: pip install "
                "'sppo-lightning[vllm]'."
            )
        self.arguments = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            **(vllm or {}),
        }
        self._llm: Any = None  # a vllm.LLM
        self._asleep = False
        self._sent: Any = None  # the fingerprint of the weights that it has
        self._own_group = False  # whether the process group was made for it

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Give vLLM the weights, unless it has them; a collective the first time, when it starts."""
        if self._llm is None:
            self._start(policy)
        self.policy, self.version = policy, version
        self._bring_up_to_date(policy)

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """The responses as they finish; see `Engine.stream`."""
        if self._llm is None or self.policy is None:
            raise RuntimeError("VLLMEngine.stream was called before update_weights.")
        if self._asleep:
            self._bring_up_to_date(self.policy)
        engine, stop = self._llm.llm_engine, StopStrings(self.policy.tokenizer, sampling.stop)
        places: dict[str, tuple[int, int]] = {}  # the prompt's row and the sample of each request under way
        try:
            for name, place in self._ask(batch, sampling):
                places[name] = place
            while places:
                for output in self._step():
                    yield cut_at_stop(_response(output, places.pop(output.request_id), self.version), stop)
        finally:
            engine.abort_request(list(places))  # what is left where the reader stops
            if self.policy.device.type == "cuda":
                self._llm.sleep(level=2)  # keeps nothing, and is given the weights when it wakes
                self._asleep = True

    def close(self) -> None:
        """End vLLM and give its memory back."""
        if self._llm is not None:
            with _surroundings_kept(), _default_group_kept():
                self._llm.llm_engine.engine_core.shutdown()
                self._llm, self._sent, self._asleep = None, None, False
                gc.collect()
        if self._own_group:
            dist.destroy_process_group()
            self._own_group = False

    def _step(self) -> list[Any]:
        """One step of vLLM, in its own precision and with random numbers of its own; what has finished."""
        assert self.policy is not None
        device = self.policy.device
        devices = [device] if device.type == "cuda" else []
        with torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices):
            return self._llm.llm_engine.step()

    def _ask(self, batch: PromptBatch, sampling: Sampling) -> Iterator[tuple[str, tuple[int, int]]]:
        """Hand in one request per response; the name of each, with the prompt's row and the sample."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        assert self.policy is not None
        longest, limit = max(map(len, batch.token_ids), default=0), self._llm.model_config.max_model_len
        if longest + sampling.max_new_tokens > limit:
            raise InputError(
                f"A prompt of {longest} tokens and `max_new_tokens`={sampling.max_new_tokens} are more than "
                f"`max_model_len`={limit} of VLLMEngine; raise it, or lower `max_new_tokens` or "
                "`max_prompt_tokens`."
            )
        seed, settings = run_seed(), request_settings(sampling, self.policy.eos_token_ids)
        places = {f"{i}.{s}": (i, s) for i in range(len(batch)) for s in range(sampling.samples_per_prompt)}
        for name, place in places.items():
            params = SamplingParams(
                **settings, seed=seed_of(seed, batch, place), output_kind=RequestOutputKind.FINAL_ONLY
            )
            try:
                self._llm.llm_engine.add_request(name, tokens_input(batch.token_ids[place[0]]), params)
            except (VLLMClientError, ValueError) as error:
                raise InputError(
                    f"vLLM refuses the request for prompt {place[0]} of the batch: {error}."
                ) from error
            yield name, place

    def _bring_up_to_date(self, policy: CausalLMPolicy) -> None:
        """Wake vLLM, and send it the weights unless it has them."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep, self._sent = False, None
        weights = fingerprint(policy)
        if weights == self._sent:
            return
        self._sent = None  # what it has when this fails is unknown
        sent = served_weights(policy, policy.device)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": sent})
        if not self._llm.llm_engine.reset_prefix_cache():  # keys and values of the weights before
            raise RuntimeError("vLLM keeps keys and values of earlier weights; it is still at work.")
        self._sent = weights

    def _start(self, policy: CausalLMPolicy) -> None:
        """Start vLLM without weights, in the process group of the trainer."""
        if not dist.is_initialized():  # or vLLM would make one, and take the first device
            backend = "cpu:gloo,cuda:nccl" if policy.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self._own_group = True
        arguments = {
            "dtype": str(policy.compute_dtype).removeprefix("torch."),
            "generation_config": "vllm",  # not what the model's authors recommend
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "load_format": "dummy",
            "distributed_executor_backend": "external_launcher",
            "enable_sleep_mode": policy.device.type == "cuda",
            **self.arguments,
        }
        with _surroundings_kept(), TemporaryDirectory() as folder:
            os.environ.update(_SETTINGS, RANK=str(dist.get_rank()), LOCAL_RANK=str(policy.device.index or 0))
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of what is meant, at each update
            write_description(policy, Path(folder))
            import vllm

            if Version(vllm.__version__).release < _OLDEST.release:
                raise InputError(
                    f"`engine`=VLLMEngine needs vLLM {_OLDEST} or newer, and {vllm.__version__} is installed."
                )
            from vllm.distributed import cleanup_dist_env_and_memory

            try:
                self._llm = vllm.LLM(folder, **arguments)
            except (ValueError, TypeError, RuntimeError) as error:
                with _default_group_kept():
                    cleanup_dist_env_and_memory()
                self.close()
                why = " ".join(str(error).split())[:500]
                raise InputError(
                    f"vLLM does not start with the settings of VLLMEngine, {self.arguments}: {why}"
                ) from error


@contextmanager
def _surroundings_kept() -> Iterator[None]:
    """Set back what vLLM sets of random states, torch and the environment, as if the process were its own."""
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """Let vLLM destroy its own process groups, but not the default one, which the trainer still needs."""
    destroy = dist.destroy_process_group

    def destroy_but_the_default(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    with mock.patch.object(dist, "destroy_process_group", destroy_but_the_default):
        yield


def _response(output: Any, place: tuple[int, int], version: int) -> Response:
    """The response in an answer of vLLM's; raises for one that is not whole."""
    [choice] = output.outputs
    ids = list(choice.token_ids)
    log_probs = [found[token].logprob for token, found in zip(ids, choice.logprobs, strict=True)]
    check_answer("vLLM", ids, log_probs, choice.finish_reason)
    return Response(*place, ids, log_probs, choice.finish_reason, version)
