import pytest
from jsonargparse import Namespace

from sppo_lightning.masking import masked, masked_text

SECRET = ["api_key", "WANDB_API_KEY", "apikey", "token", "hf_token", "auth_token", "password", "db_password"]
SECRET += ["client_secret", "aws_secret_access_key", "secret_key", "Authorization", "X-API-Key", "credentials"]
OPEN = ["max_new_tokens", "eos_token", "pad_token", "tokenizer", "micro_batch_tokens", "key", "keyboard", "name"]
OPEN += ["rank_zero_only", "passes", "author", "secretary", "token_ids"]


@pytest.mark.parametrize("name", SECRET)
def test_a_secret_is_masked_at_any_depth(name: str):
    config = Namespace(trainer=Namespace(logger=[Namespace(init_args={"headers": {name: "hunter2"}})]))
    assert masked(config).as_dict() == {"trainer": {"logger": [{"init_args": {"headers": {name: "***"}}}]}}
    assert masked({name: ["hunter2", "hunter3"]}) == {name: ["***", "***"]}
    assert config.trainer.logger[0].init_args["headers"][name] == "hunter2"  # the run still has it


@pytest.mark.parametrize("name", OPEN)
def test_other_settings_stay(name: str):
    assert masked({name: "value"}) == {name: "value"}


def test_what_is_no_text_stays():
    config = {"api_key": None, "password": "", "token": 3, "betas": (0.9, 0.99), "text": "a: b"}
    assert masked(config) == config


def test_a_password_in_an_address():
    address = "postgres://me:hunter2@host:5432/runs"
    assert masked({"tracking_uri": address}) == {"tracking_uri": "postgres://me:***@host:5432/runs"}
    assert masked("http://host:8000/a@b") == "http://host:8000/a@b"
    assert masked_text(f"`servers`={address} cannot be reached.") == (
        "`servers`=postgres://me:***@host:5432/runs cannot be reached."
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("`api_key`=hunter2 must be a number.", "`api_key`=*** must be a number."),
        (
            "`logger`={'hf_token': 'hunter 2', 'rate': 1} must be text.",
            "`logger`={'hf_token': ***, 'rate': 1} must be text.",
        ),
        ("password: hunter2", "password: ***"),
        ("`max_new_tokens`=3 is a lot.", "`max_new_tokens`=3 is a lot."),
        ("`eos_token`=</s> is unknown.", "`eos_token`=</s> is unknown."),
    ],
)
def test_a_message_that_quotes_a_secret(text: str, said: str):
    assert masked_text(text) == said
