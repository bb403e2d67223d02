"""Where submitted code runs: nothing of the machine is there to see, to reach or to harm."""

from sppo_lightning.verification.sandbox.launch import Sandbox, SandboxFailure
from sppo_lightning.verification.sandbox.self_test import check_sandbox
from sppo_lightning.verification.sandbox.values import NotPlain, decode, encode

__all__ = ["NotPlain", "Sandbox", "SandboxFailure", "check_sandbox", "decode", "encode"]
