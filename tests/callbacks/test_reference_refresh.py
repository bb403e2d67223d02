import math
from pathlib import Path

import pytest
from toy_pipeline import Recites, Toy, fit, loader, trainer_of

from sppo_lightning.callbacks.reference_refresh import ReferenceRefresh
from sppo_lightning.errors import InputError
from sppo_lightning.models import LoRA, TinyPolicy


def test_reference_refresh_follows_updates(tmp_path: Path):
    batches = [["a"]] * 6
    module, trainer = fit(ReferenceRefresh(every_n_updates=10, mix=0.5), batches=batches, module=Toy(updates=4))
    # 4, 8, 12, 16, 20, 24 updates: the multiple of 10 is passed at 12 and reached at 20
    assert module.refreshed_at == [(12, 0.5), (20, 0.5)]

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Toy(updates=4)
    resumed = trainer_of(Recites(), ReferenceRefresh(every_n_updates=10), max_epochs=2)
    resumed.fit(again, loader(*batches), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert again.refreshed_at == [(32, 1.0), (40, 1.0)]


def test_reference_refresh_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match=r"model\.kl_coef"):
        fit(ReferenceRefresh(), batches=[["a"]], module=Toy(reference=None))
    policy = TinyPolicy("a b", hidden_size=4, num_layers=1, num_heads=1, intermediate_size=4, lora=LoRA(rank=1))
    policy.build()
    with pytest.raises(InputError, match=r"model\.policy\.lora.*remove ReferenceRefresh or train without"):
        fit(ReferenceRefresh(), batches=[["a"]], module=Toy(reference=policy.as_reference()))
    with pytest.raises(InputError, match="every_n_updates"):
        ReferenceRefresh(every_n_updates=0)
    for mix in (0.0, 1.1, math.nan):
        with pytest.raises(InputError, match="mix"):
            ReferenceRefresh(mix=mix)
