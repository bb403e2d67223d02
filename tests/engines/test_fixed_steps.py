"""Steps of fixed shapes: few of them, and nothing but what is asked for comes back."""

import torch
from contract import ids, sample
from tiny import make_policy
from torch import Tensor

from sppo_lightning.engines import HFEngine
from sppo_lightning.engines.decoding import Decoder
from sppo_lightning.engines.fixed_steps import FixedSteps
from sppo_lightning.engines.slots import SlotCache


def test_shapes_are_few(monkeypatch):
    seen: list[tuple[int, int]] = []
    step = Decoder._next

    def spy(
        self: Decoder, newest: Tensor, positions: Tensor, uniforms: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        assert newest.shape == positions.shape == uniforms.shape
        seen.append((len(newest), width))
        return step(self, newest, positions, uniforms, width)

    policy = make_policy()
    policy.model.generation_config.eos_token_id = [1, 5, 9]
    settings = {"samples_per_prompt": 3, "max_new_tokens": 300, "temperature": 0.7}
    expected = sample(HFEngine(), policy, **settings)
    monkeypatch.setattr(Decoder, "_next", spy)
    rollouts = sample(HFEngine(cuda_graphs=True, max_rows=20), policy, **settings)
    assert ids(rollouts) == ids(expected)
    assert {rows for rows, _ in seen} <= {1, 2, 4, 8, 16, 20}
    assert {width for _, width in seen} <= {256, 512}
    assert len(seen) > 5 * len(set(seen))


def test_rows_that_are_not_there_get_nothing_back():
    def step(newest: Tensor, positions: Tensor, uniforms: Tensor, width: int) -> tuple[Tensor, Tensor]:
        assert newest.tolist() == [7, 8, 9, 0]
        assert cache.used == len(newest) == 4
        return newest + 1, uniforms + width

    cache = SlotCache(layers=1, rows=6, columns=8)
    cache.layers[0].update(*torch.zeros(2, 3, 1, 5, 2))
    cache.used = 3
    tokens, log_probs = FixedSteps(step, cache)(
        torch.tensor([7, 8, 9]), torch.tensor([4, 4, 5]), torch.tensor([0.5, 0.25, 0.0]), 6
    )
    assert tokens.tolist() == [8, 9, 10]
    assert log_probs.tolist() == [256.5, 256.25, 256.0]
    assert cache.used == 3


def test_room_is_made_before_the_step():
    cache = SlotCache(layers=2, rows=2, columns=8)
    for layer in cache.layers:
        layer.update(*torch.ones(2, 2, 1, 5, 3))
    cache.used = 2
    assert cache.reserve(8) == 8
    assert cache.reserve(300) >= 300
    for layer in cache.layers:
        assert layer.keys.shape[2] == cache.reserve(300)
        assert layer.keys[:, :, :5].eq(1).all()
        assert layer.keys[:, :, 5:300].eq(0).all()
