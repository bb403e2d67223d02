import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from sppo_lightning.callbacks import MathVerifier
from sppo_lightning.data import PromptDataModule, PromptFile
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


class NoRollouts(Stage):
    """Stands where the policy would sample."""

    provides = frozenset({"rollouts"})

    def process(self, batch, trainer, module):
        """Leave the batch without responses."""


class Reader(LightningModule):
    """Notes the prompts that each loop draws; learns nothing."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.policy = SimpleNamespace(tokenizer=tokenizer)
        self.automatic_optimization = False
        self.drawn = {}
        self.phase_seconds = {}

    def _note(self, batch, dataloader_idx=0):
        self.drawn.setdefault(dataloader_idx, []).extend((p.dataset, p.row, p.gold) for p in batch.prompts)

    def training_step(self, batch, batch_idx):
        self._note(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self._note(batch, dataloader_idx)

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return None


@pytest.fixture
def trainer(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **quiet,
    )


@pytest.fixture
def files(write_jsonl):
    return SimpleNamespace(
        train=write_jsonl([{"prompt": "one " * (i + 1), "answer": i} for i in range(6)], "train.jsonl"),
        small=write_jsonl([{"question": "two", "answer": f"#### {i}"} for i in range(3)], "small.jsonl"),
        tiny=write_jsonl([{"prompt": "three", "solution": "x"}], "tiny.jsonl"),
        unanswered=write_jsonl([{"prompt": "four"}, {"prompt": "five"}], "unanswered.jsonl"),
    )


def test_every_loop_draws_its_own_sets(trainer, tokenizer, files):
    settings = {"batch_size": 2, "validation_batch_size": 2, "shuffle": False}
    validation = {"small": files.small, "tiny": PromptFile(files.tiny, layout="trl")}
    data = PromptDataModule(files.train, validation, **settings)
    small, tiny = [("small", i, str(i)) for i in range(3)], [("tiny", 0, "x")]
    assert data.validation_names == data.test_names == ["small", "tiny"]
    for loop in (trainer.validate, trainer.test, trainer.predict):
        module = Reader(tokenizer)
        loop(module, data)
        assert module.drawn == {0: small, 1: tiny}

    data = PromptDataModule(files.train, test={"tiny": files.tiny}, predict=files.unanswered, **settings)
    assert (data.validation_names, data.test_names) == ([], ["tiny"])
    module = Reader(tokenizer)
    trainer.test(module, data)
    assert module.drawn == {0: tiny}
    module = Reader(tokenizer)
    trainer.predict(module, data)
    assert module.drawn == {0: [("predict", 0, ""), ("predict", 1, "")]}
    module = Reader(tokenizer)
    trainer.fit(module, data)
    assert module.drawn == {0: [("train", i, str(i)) for i in range(6)]}


def test_spare_prompts_are_training_prompts_and_their_position_is_saved(trainer, tokenizer, files):
    data = PromptDataModule(files.train, {"small": files.small}, batch_size=2, seed=3)
    trainer.fit(Reader(tokenizer), data)
    spare = data.spare_prompts(6)
    assert {(p.dataset, p.gold) for p in spare.prompts} == {("train", str(i)) for i in range(6)}
    assert spare.token_ids == [[6] * (prompt.row + 1) for prompt in spare.prompts]
    assert data.state_dict()["train"]["spare_draws"] == 1


def test_fit_checks_the_validation_sets_before_the_first_step(trainer, tokenizer, files, write_jsonl):
    broken = write_jsonl([{"prompt": "one", "answer": "1"}, {"prompt": "two"}], "broken.jsonl")
    module = Reader(tokenizer)
    with pytest.raises(InputError) as caught:
        trainer.fit(module, PromptDataModule(files.train, {"broken": broken}, batch_size=2))
    assert str(caught.value) == (
        f"{broken} has 1 unusable row, counted from 0 (row 1: no gold answer in answer); "
        "mend or remove them, or set `on_bad_row` to skip."
    )
    assert module.drawn == {}


def test_bad_rows_are_skipped_where_that_is_asked_for(trainer, chat_tokenizer, write_jsonl):
    rows = [
        {"prompt": "one", "answer": "1"},
        {"prompt": "", "answer": "2"},
        {"prompt": "three", "answer": "3"},
    ]
    data = PromptDataModule(validation={"some": write_jsonl(rows)}, on_bad_row="skip")
    module = Reader(chat_tokenizer)
    trainer.validate(module, data)
    assert module.drawn == {0: [("some", 0, "1"), ("some", 2, "3")]}
    assert data.skipped == {"some": 1}
    data = PromptDataModule(validation={"none": write_jsonl(rows[1:2])}, on_bad_row="skip")
    with pytest.raises(
        InputError, match=r"has nothing but 1 unusable row, .* \(row 0: no prompt in prompt\); mend"
    ):
        trainer.validate(module, data)


def test_verifiers_are_asked_whether_they_can_do_anything_with_a_row(trainer, tokenizer, write_jsonl):
    rows = [
        {"prompt": "one", "answer": r"\frac{1}{2}"},
        {"prompt": "two", "answer": r"\frac{1"},
        {"prompt": "three", "answer": r"\frac{1", "data_source": "words"},
    ]
    verifier = MathVerifier(applies_to=["some"])
    trainer.callbacks += [NoRollouts(), verifier]
    with pytest.raises(InputError) as caught:
        trainer.validate(Reader(tokenizer), PromptDataModule(validation={"some": write_jsonl(rows)}))
    assert "2 unusable rows, counted from 0 (rows 1, 2: the gold answer" in str(caught.value)
    verifier.applies_to = ("words",)
    with pytest.raises(InputError, match=r"1 unusable row, counted from 0 \(row 2: the gold answer"):
        trainer.validate(Reader(tokenizer), PromptDataModule(validation={"some": write_jsonl(rows)}))
    verifier.applies_to = None
    data, module = PromptDataModule(validation={"some": write_jsonl(rows)}, on_bad_row="skip"), Reader(tokenizer)
    trainer.validate(module, data)
    assert data.skipped == {"some": 2}
    assert [row for _, row, _ in module.drawn[0]] == [0]


def test_over_long_prompts_are_left_out_after_templating_and_counted(
    trainer, tokenizer, chat_tokenizer, files, caplog
):
    # the rows hold 1 to 6 words, and the chat template adds two
    for policy_tokenizer, kept in ((tokenizer, 4), (chat_tokenizer, 2)):
        data = PromptDataModule(validation={"words": files.train}, max_prompt_tokens=4)
        module = Reader(policy_tokenizer)
        with caplog.at_level(logging.INFO):
            trainer.validate(module, data)
        assert module.drawn == {0: [("words", i, str(i)) for i in range(kept)]}
        assert data.dropped == {"words": 6 - kept}
        assert (
            f"words: {kept} prompts of {files.train}; left out {6 - kept} longer than 4 tokens and 0 that cannot be used."
        ) in caplog.messages
    with pytest.raises(InputError) as caught:
        trainer.validate(module, PromptDataModule(validation={"words": files.train}, max_prompt_tokens=2))
    assert str(caught.value) == f"`max_prompt_tokens`=2 leaves none of the 6 prompts of {files.train}; raise it."


def test_the_format_reaches_the_prompts(trainer, chat_tokenizer, files):
    data = PromptDataModule(validation={"tiny": files.tiny}, system_prompt="one", suffix=" two")
    trainer.validate(Reader(chat_tokenizer), data)
    (batch,) = data.val_dataloader()[0]
    assert batch.prompts[0].text == "<system> one <user> three two <assistant>"
    assert batch.prompts[0].question == "system: one\nuser: three two"
    assert batch.token_ids == [[4, 6, 3, 8, 7, 5]]


def test_a_source_may_have_a_suffix_of_its_own(trainer, chat_tokenizer, files):
    own, none = (PromptFile(files.tiny, suffix=suffix) for suffix in (" ten", ""))
    data = PromptDataModule(validation={"tiny": files.tiny, "own": own, "none": none}, suffix=" two")
    trainer.validate(Reader(chat_tokenizer), data)
    texts = [loader.prompts[0].text for loader in data.val_dataloader()]
    assert texts == [f"<user> three{suffix} <assistant>" for suffix in (" two", " ten", "")]


def test_the_seed_is_the_runs_unless_it_is_set(trainer, tokenizer, files, monkeypatch):
    def order(seed):
        data = PromptDataModule(files.train, batch_size=6, seed=seed)
        module = Reader(tokenizer)
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit_loop._combined_loader = None
        trainer.fit(module, data)
        return [row for _, row, _ in module.drawn[0]]

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    unseeded = order(None)
    assert unseeded == order(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert order(None) == order(3) != unseeded


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 0}, "`batch_size`=0 leaves no prompt; use 1 or more."),
        ({"max_prompt_tokens": 0}, "`max_prompt_tokens`=0 leaves no prompt; use 1 or more."),
        ({"seed": -1}, "`seed`=-1 of the data is negative; use 0 or more."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(InputError) as caught:
        PromptDataModule(**settings)
    assert str(caught.value) == sentence


def test_missing_sets_are_refused(trainer, tokenizer, files):
    with pytest.raises(InputError, match="`data.train` is not set, so there is nothing to fit"):
        trainer.fit(Reader(tokenizer), PromptDataModule(validation={"small": files.small}))
    with pytest.raises(InputError, match="`data` has no set for validate; give `validation` at least one, by name"):
        trainer.validate(Reader(tokenizer), PromptDataModule(files.train))
    with pytest.raises(InputError, match="cannot have a set named train"):
        trainer.validate(Reader(tokenizer), PromptDataModule(validation={"train": files.small}))


def run_cli(*args):
    return LightningCLI(
        Reader,
        PromptDataModule,
        subclass_mode_data=True,
        save_config_callback=None,
        run=False,
        args=list(args),
    )


@pytest.fixture
def config(tmp_path, files):
    (tmp_path / "run.yaml").write_text(f"""
data:
  class_path: sppo_lightning.data.PromptDataModule
  init_args:
    train: {files.train}
    validation:
      small: {files.small}
      tiny:
        class_path: PromptFile
        init_args: {{path: {files.tiny}, layout: trl, columns: {{answer: solution}}}}
    batch_size: 4
    template: plain
""")
    return f"--config={tmp_path / 'run.yaml'}"


def test_the_command_line_builds_it_from_yaml(config, files):
    data = run_cli(config, "--data.max_prompt_tokens=7", "--data.train=other.csv").datamodule
    assert isinstance(data, PromptDataModule)
    assert (data.batch_size, data.template, data.max_prompt_tokens) == (4, "plain", 7)
    tiny = data.validation["tiny"]
    assert isinstance(tiny, PromptFile)
    assert (tiny.path, tiny.layout, tiny.columns) == (files.tiny, "trl", {"answer": "solution"})
    assert (data.train, data.validation["small"]) == ("other.csv", files.small)


@pytest.mark.parametrize("typo", ["--data.batchsize=4", "--data.template=chatty", "--data.on_bad_row=ignore"])
def test_a_typo_on_the_command_line_is_an_error(config, typo, capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(config, typo)
    assert caught.value.code == 2
    assert typo.split("=")[0].rpartition(".")[2] in capsys.readouterr().err


def test_a_typo_in_a_nested_source_is_an_error(tmp_path, config, files, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("layout: trl", "layuot: trl"))
    with pytest.raises(SystemExit):
        run_cli(config)
    assert "layuot" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.exists(), reason="the real data sets are not beside this repository")
def test_real_data_sets(trainer, chat_tokenizer):
    validation = {name: str(DATA / f"{name}.parquet") for name in ("math500", "aime25")}
    data = PromptDataModule(str(DATA / "dapo-math-17k.parquet"), validation, shuffle=False, max_prompt_tokens=2048)
    trainer.limit_train_batches = trainer.limit_val_batches = 1
    module = Reader(chat_tokenizer)
    trainer.fit(module, data)
    sets = [data.train_dataloader(), *data.val_dataloader()]
    assert [len(each.prompts) for each in sets] == [17398, 500, 30]
    assert [each.prompts[0].gold for each in sets] == ["34", r"\left( 3, \frac{\pi}{2} \right)", "70"]
    assert [len(each) for each in sets] == [67, 2, 1]
    assert sets[2].prompts[0].metadata["extra_info"] == {"index": 0, "solution": "70"}
    assert sets[2].prompts[0].text == (
        "<user> Find the sum of all integer bases $b>9$ for which $17_{b}$ is a divisor of $97_{b}$. "
        r"Please output the final answer within \boxed{}. <assistant>"
    )


class Imitator(Reader):
    """Learns from demonstrations."""

    imitates = True


def test_who_imitates_needs_demonstrations_and_golds_only_where_something_scores(trainer, tokenizer, write_jsonl):
    shown = write_jsonl([{"prompt": "one", "response": "two"}, {"messages": None, "prompt": "one", "response": ""}])
    asked = write_jsonl([{"prompt": "three"}], "asked.jsonl")
    with pytest.raises(
        InputError, match=r"1 unusable row, counted from 0 \(row 1: no demonstration to learn from \("
    ):
        trainer.fit(Imitator(tokenizer), datamodule=PromptDataModule(shown, {"asked": asked}, batch_size=1))
    data = PromptDataModule(shown, {"asked": asked}, batch_size=1, on_bad_row="skip")
    trainer.fit(Imitator(tokenizer), datamodule=data)
    assert [(p.dataset, p.demonstration, p.gold) for p in data.prompts()] == [
        ("asked", None, ""),
        ("train", "two", ""),
    ]
    judged = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[NoRollouts(), MathVerifier()]
    )
    with pytest.raises(InputError, match="asked.jsonl has no column answer"):
        judged.fit(
            Imitator(tokenizer),
            datamodule=PromptDataModule(shown, {"asked": asked}, batch_size=1, on_bad_row="skip"),
        )
    with pytest.raises(InputError, match=r"rows.jsonl has no column answer"):
        trainer.fit(Reader(tokenizer), datamodule=PromptDataModule(shown, batch_size=1))


def test_turns_are_rendered_for_who_imitates_alone(trainer, chat_tokenizer, write_jsonl):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = write_jsonl([{"messages": turns, "answer": "2"}])
    found = []
    for module in (Imitator, Reader):
        data = PromptDataModule(path, batch_size=1)
        trainer.fit(module(chat_tokenizer), datamodule=data)
        found += [(prompt.text, prompt.demonstration) for prompt in data.prompts()]
    assert found == [("<user> one <assistant>", " two"), ("<user> one <assistant>", "two")]
