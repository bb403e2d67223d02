"""Hypothesis strategies: a config that works, and data rows that do, changed in ways that people and disks do."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from hypothesis import strategies as st
from tiny_config import EXACT, GOOD, ROLLOUT, changed

KEEPER = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}
SAMPLING = {
    "temperature": 0.9,
    "max_new_tokens": 2,
    "samples_per_prompt": 1,
    "top_k": 0,
    "top_p": 1.0,
    "stop": ["x"],
}
CHANGES = {
    "seed_everything": 1,
    "threads": 1,
    "model.init_args.policy_optimizer": {"lr": 1e-3, "betas": [0.9, 0.99], "max_grad_norm": 1.0},
    "model.init_args.mini_batch_size": 4,
    "model.init_args.micro_batch_tokens": 64,
    "model.init_args.kl_coef": 0.1,
    "model.init_args.lr_schedule": "linear",
    "model.init_args.critic.init_args.lora": {"rank": 2, "alpha": 4.0},
    "data.init_args.validation": {"easy": "train.jsonl"},
    "data.init_args.max_prompt_tokens": 32,
    "trainer.max_steps": 1,
    "trainer.logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "run"}},
    "trainer.enable_checkpointing": True,
    "trainer.callbacks": [{**ROLLOUT, "init_args": {"sampling": SAMPLING}}, EXACT, KEEPER],
}
WHOLE = changed(CHANGES)
CLASSES = [
    "os.system",
    "builtins.dict",
    "torch.nn.Linear",
    "nowhere.Nothing",
    "sppo_lightning.SPPOModule",
    "sppo_lightning.SFTModule",
    "sppo_lightning.data.PromptFile",
    "sppo_lightning.data.PromptDataModule",
    "sppo_lightning.models.CausalLMPolicy",
    "sppo_lightning.models.PromptCritic",
    "sppo_lightning.models.TokenCritic",
    "sppo_lightning.engines.PagedEngine",
    "sppo_lightning.callbacks.MathVerifier",
    "sppo_lightning.callbacks.HFExport",
    "sppo_lightning.callbacks.MemoryPlan",
    "sppo_lightning.callbacks.DynamicSampling",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.WandbLogger",
]
NUMBERS = [0, -1, 1, 3, 1.5, 10**6, 10**9, 10**12, 10**30, -(10**9), 1e-300, 1e300, float("nan"), float("inf")]
OTHERS = [
    None,
    True,
    False,
    "",
    "x",
    "auto",
    [],
    {},
    [1],
    {"a": 1},
    ["x", None],
    "./nowhere",
    "config.yaml",
    "1e3",
    "\x00",
]
SCALARS = st.sampled_from([*NUMBERS, *OTHERS]) | st.text(max_size=8) | st.integers() | st.floats()
Path = tuple[Any, ...]


def paths(node: Any, path: Path = ()) -> Iterator[Path]:
    """Where something stands, at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def _at(config: Any, path: Path) -> Any:
    for key in path:
        config = config[key]
    return config


def _delete(draw: Callable[..., Any], config: Any, path: Path) -> None:
    del _at(config, path[:-1])[path[-1]]


def _rename(draw: Callable[..., Any], config: Any, path: Path) -> None:
    node = _at(config, path[:-1])
    if isinstance(node, dict):
        key = str(path[-1])
        cut = draw(st.integers(0, len(key) - 1))
        other = draw(
            st.sampled_from([key[:cut] + key[cut + 1 :], key.upper(), f"{key}s", *map(str, node), 3, None])
        )
        node[other] = node.pop(path[-1])


def _retype(draw: Callable[..., Any], config: Any, path: Path) -> None:
    pool = st.sampled_from(CLASSES) | SCALARS if path[-1] == "class_path" else SCALARS
    _at(config, path[:-1])[path[-1]] = draw(pool)


def _number(draw: Callable[..., Any], config: Any, path: Path) -> None:
    """Another number in place of one, wherever `path` leads."""
    kinds = {p: type(_at(config, p)) for p in paths(config) if type(_at(config, p)) in (int, float)}
    if kinds:
        path = draw(st.sampled_from(list(kinds)))
        pool = [number for number in NUMBERS if isinstance(number, kinds[path])] or NUMBERS
        _at(config, path[:-1])[path[-1]] = draw(st.sampled_from(pool) | st.integers(0, 20).map(kinds[path]))


def _wrap(draw: Callable[..., Any], config: Any, path: Path) -> None:
    value = _at(config, path)
    _at(config, path[:-1])[path[-1]] = draw(st.sampled_from([[value], {"x": value}, str(value), [value, value]]))


def _swap(draw: Callable[..., Any], config: Any, path: Path) -> None:
    other = draw(
        st.sampled_from([p for p in paths(config) if p[: len(path)] != path and path[: len(p)] != p] or [path])
    )
    one, two = copy.deepcopy(_at(config, path)), copy.deepcopy(_at(config, other))
    _at(config, path[:-1])[path[-1]], _at(config, other[:-1])[other[-1]] = two, one


def _copy(draw: Callable[..., Any], config: Any, path: Path) -> None:
    _at(config, path[:-1])[path[-1]] = copy.deepcopy(_at(config, draw(st.sampled_from(list(paths(config))))))


@st.composite
def torn(draw: Callable[..., Any], text: bytes) -> bytes:
    """The bytes with a few cut out, put in, written twice or flipped."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        new = draw(
            st.sampled_from(
                [b"", text[start:end] * 2, b"\t", b"\x00", b"\xff", b"&a *a", b"---\n", b": ", b"[", b'"']
            )
        )
        text = text[:start] + new + text[end:]
    return text


@st.composite
def configs(draw: Callable[..., Any]) -> bytes:
    """The text of a config file with one to three changes."""
    config = copy.deepcopy(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        where = list(paths(config))
        if where:
            change = draw(
                st.sampled_from([*[_number] * 8, _retype, _retype, _delete, _rename, _wrap, _swap, _copy])
            )
            change(draw, config, draw(st.sampled_from(where)))
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    return draw(torn(text)) if draw(st.integers(0, 3)) == 0 else text


VALUES = st.recursive(
    SCALARS | st.sampled_from(["\ud800", "a b", "<eos>", "a " * 200, "\\frac{1}{2}", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "x"]) | VALUES, "content": VALUES}
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": VALUES | st.lists(MESSAGES, max_size=2),
        "answer": VALUES,
        "id": VALUES,
        "response": VALUES,
    },
)


@st.composite
def data(draw: Callable[..., Any]) -> bytes:
    """A JSONL file of good rows and others, or one that was torn."""
    rows = draw(st.permutations([*GOOD, *draw(st.lists(ROWS, max_size=3))]))
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return draw(torn(text)) if draw(st.booleans()) else text
