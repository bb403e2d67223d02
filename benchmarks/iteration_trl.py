"""The peer of `iteration.py`: TRL's GRPOTrainer on a CPU, in an interpreter that has `trl`; not run by hand.

What it is given is its best reasonable setting on a CPU: no reference model (`beta=0`), the responses of an
iteration sampled by one batched `generate()` with a static cache (as fast as the default for 64 tokens, more than
twice as fast for 1,500, where the default copies all keys and values at each token), fp32 without gradient
checkpointing, fused AdamW (its default), and nothing logged, saved or shown. Rows per forward come from
`iteration_cases.py`; on the quickstart's model 16 to 128 were equally fast. Continuous batching was several times
slower.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import trl
except ImportError:
    sys.exit(
        "TRL is not installed in this interpreter: `pip install torch==2.13.0 && pip install trl==1.16.0` in an "
        "environment of its own, and give its interpreter as --peer-python."
    )
import torch
import transformers
from datasets import Dataset
from iteration_rewards import REWARDS
from transformers import PreTrainedTokenizerFast, TrainerCallback


class Clock(TrainerCallback):
    """The seconds of each iteration, and of the trainer's methods that sample and verify in it."""

    def __init__(self, updates: int) -> None:
        self.updates = updates  # per iteration
        self.iterations: list[dict[str, float]] = []
        self.phases = {"sample": 0.0, "verify": 0.0}
        self.start_mb = 0.0
        self._before = self._cpu_before = 0.0

    def timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The method, with its seconds counted under `phase`."""

        def run(*arguments: Any, **settings: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments, **settings)
            self.phases[phase] += time.perf_counter() - start
            return result

        return run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start."""
        self.start_mb = peak_mb()
        self._before, self._cpu_before = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the time of an iteration, if this was its last update."""
        if state.global_step % self.updates == 0:
            now, cpu = time.perf_counter(), time.process_time()
            times = {"seconds": now - self._before, "cpu_seconds": cpu - self._cpu_before}
            self.iterations.append({**times, **self.phases})
            self.phases = dict.fromkeys(self.phases, 0.0)
            self._before, self._cpu_before = now, cpu


def peak_mb() -> float:
    """Most memory that the process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def config(settings: dict[str, Any]) -> trl.GRPOConfig:
    """GRPO with the lengths, the batches and the loss of our side."""
    responses = settings["prompts"] * settings["samples"]
    return trl.GRPOConfig(
        output_dir=settings["folder"],
        generation_batch_size=responses,
        num_generations=settings["samples"],
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=responses // settings["updates"] // settings["rows"],
        max_completion_length=settings["tokens"],
        temperature=settings["temperature"],
        max_steps=settings["updates"] * settings["iterations"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        loss_type="grpo",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_vllm=False,
        cache_implementation="static",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=settings["seed"],
    )


def main() -> None:
    """Train as the JSON file in the first argument says, and write what it took."""
    if sys.argv[1:] == ["--check"]:  # whether this file's imports are there
        return
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    reward = REWARDS[settings["reward"]]

    def score(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [reward(gold, text) for gold, text in zip(answer, completions, strict=True)]

    clock = Clock(settings["updates"])
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    trainer = trl.GRPOTrainer(
        settings["model"],
        reward_funcs=score,
        args=config(settings),
        train_dataset=Dataset.from_list(rows),
        # AutoTokenizer would read the model's word-level tokenizer by the rules of its family, and split its words
        processing_class=PreTrainedTokenizerFast.from_pretrained(settings["model"]),
        callbacks=[clock],
    )
    assert trainer.model.dtype == torch.float32
    trainer._generate = clock.timed(trainer._generate, "sample")
    trainer._calculate_rewards = clock.timed(trainer._calculate_rewards, "verify")
    trainer.train()
    last = trainer.state.log_history[-1]
    result = {
        "iterations": clock.iterations,
        "updates": trainer.state.global_step,
        "response_tokens": float(last["completions/mean_length"]),
        "with_advantage": 1.0 - float(last["frac_reward_zero_std"]),
        "start_mb": clock.start_mb,
        "peak_mb": peak_mb(),
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(settings["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
