import pytest
from tokenizers.processors import TemplateProcessing

from sppo_lightning.data.formatting import PromptFormat
from sppo_lightning.data.layouts import RowError
from sppo_lightning.errors import InputError

SYSTEM = {"role": "system", "content": "one"}
USER = {"role": "user", "content": "two"}


def test_auto_is_chat_where_the_tokenizer_has_a_template(chat_tokenizer):
    prompt_format = PromptFormat(chat_tokenizer)
    assert prompt_format.render((SYSTEM, USER)) == ("<system> one <user> two <assistant>", (SYSTEM, USER))
    assert prompt_format.render("two") == ("<user> two <assistant>", (USER,))
    assert prompt_format.encode(["<user> two <assistant>"]) == [[3, 7, 5]]


def test_auto_is_plain_where_it_has_none(tokenizer):
    prompt_format = PromptFormat(tokenizer)
    assert prompt_format.render("two") == ("two", None)
    assert prompt_format.render((SYSTEM, USER)) == ("one\n\ntwo", (SYSTEM, USER))
    assert prompt_format.encode(["one two", "ten"]) == [[6, 7], [15]]
    assert prompt_format.encode([]) == []


def test_plain_ignores_a_chat_template(chat_tokenizer):
    assert PromptFormat(chat_tokenizer, "plain").render("two") == ("two", None)


def test_system_prompt_and_suffix(chat_tokenizer, tokenizer):
    answer = {"role": "assistant", "content": "three"}
    chat = PromptFormat(chat_tokenizer, "chat", system_prompt="ten", suffix=" nine")
    text, turns = chat.render((SYSTEM, USER, answer, USER))
    assert text == "<system> ten <user> two <assistant> three <user> two nine <assistant>"
    assert turns[-1] == {"role": "user", "content": "two nine"}
    assert turns[0] == {"role": "system", "content": "ten"}
    assert chat.render("one")[0] == "<system> ten <user> one nine <assistant>"
    plain = PromptFormat(tokenizer, "plain", system_prompt="ten", suffix=" nine")
    assert plain.render("one")[0] == "ten\n\none nine"
    assert plain.render((SYSTEM, USER))[0] == "ten\n\ntwo nine"
    assert chat.render("one", suffix=" five")[0] == "<system> ten <user> one five <assistant>"
    assert plain.render("one", suffix="")[0] == "ten\n\none"
    assert USER == {"role": "user", "content": "two"}  # the row's own turns stay as they are


def test_special_tokens_are_added_to_plain_text_alone_and_never_end_it(tokenizer, chat_tokenizer):
    for each in (tokenizer, chat_tokenizer):
        # <system> stands for a beginning-of-sequence token here
        each.backend_tokenizer.post_processor = TemplateProcessing(
            single="<system> $A <eos>", special_tokens=[("<system>", 4), ("<eos>", 1)]
        )
    assert PromptFormat(tokenizer).encode(["one two"]) == [[4, 6, 7]]
    assert PromptFormat(chat_tokenizer).encode(["one two"]) == [[6, 7]]


def test_an_end_of_sequence_that_the_text_itself_ends_in_stays(tokenizer):
    assert PromptFormat(tokenizer).encode(["one <eos>"]) == [[6, 1]]


def test_chat_without_a_template_is_refused(tokenizer):
    with pytest.raises(
        InputError, match=r"`template`=chat needs a chat template, and the policy's tokenizer .* has none"
    ):
        PromptFormat(tokenizer, "chat")


def test_a_tokenizer_without_an_end_of_sequence_is_refused(make_tokenizer):
    with pytest.raises(
        InputError, match=r"has no end-of-sequence token, so no response could end; set `eos_token`"
    ):
        PromptFormat(make_tokenizer(eos_token=None))


def test_what_the_chat_template_refuses_is_a_bad_row(make_tokenizer):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}ok"
    prompt_format = PromptFormat(make_tokenizer(template))
    assert prompt_format.render((USER,))[0] == "ok"
    with pytest.raises(RowError, match=r"the chat template refuses the messages \(no system turn, please\)"):
        prompt_format.render((SYSTEM, USER))
