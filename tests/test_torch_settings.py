"""What a thread or a process takes over from the one that starts it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from sppo_lightning.torch_settings import TorchSettings


def test_a_thread_leaves_the_default_dtype_as_it_is_when_it_starts():
    """The default is the process's: a thread that starts late would bring back one that has long been undone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        settings = TorchSettings.here(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    with ThreadPoolExecutor(1, initializer=settings.adopt) as thread:
        assert thread.submit(torch.get_default_dtype).result() == before
    assert torch.get_default_dtype() == before


def test_precision_is_the_one_of_the_thread_that_asked():
    with torch.autocast("cpu", torch.bfloat16):
        settings = TorchSettings.here(torch.device("cpu"))

    def product() -> torch.Tensor:
        with settings.precision():
            return torch.ones(2, 2) @ torch.ones(2, 2)

    with ThreadPoolExecutor(1, initializer=settings.adopt) as thread:
        assert thread.submit(product).result().dtype == torch.bfloat16
