"""A real vLLM server with a tiny model, on this machine's CPU."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny import make_policy

from sppo_lightning.engines.weight_transfer import WeightTransfer


def served_policy(seed: int = 0) -> Any:
    """The tiny policy, with the heads of 32 that vLLM's attention on a CPU needs at least."""
    return make_policy(seed, hidden_size=64, max_tokens=512)


class VLLMProcess:
    """One server, started by the command that the transfer gives, with what a CPU needs besides."""

    def __init__(self, transfer: WeightTransfer, logs: Path, environment: Mapping[str, str] = {}) -> None:  # noqa: B006
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = logs / f"server_{port}.log"
        settings, *command = shlex.split(transfer.prepare(served_policy()))
        command[0] = sys.executable
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "512", "--max-num-seqs", "64"]
        variables = {
            **os.environ,
            **environment,
            **dict([settings.split("=")]),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Return when the server answers; fail with its last words when it has ended instead."""
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"The server has ended:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End the server and the processes that it started, as a crash would."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
