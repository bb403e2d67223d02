"""Literal tensors, what counts as equal, and ranks that are threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def tensor(*values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def logs(*ratios: Any) -> Tensor:
    return tensor(*ratios).log()


def assert_close(actual: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def on_ranks(*shares: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """What each rank's share of the work returns; all run at once, and their sums meet as a collective call's do."""
    meet, given = Barrier(len(shares), timeout=10), [torch.empty(0)] * len(shares)

    def work(rank: int) -> Any:
        def sum_over_ranks(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            meet.wait()
            total = torch.stack(given).sum(dim=0)
            meet.wait()  # nobody gives the next tensor before all have read this one
            return total

        try:
            return shares[rank](sum_over_ranks)
        except BaseException:
            meet.abort()  # the others would wait for ever
            raise

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, range(len(shares))))
