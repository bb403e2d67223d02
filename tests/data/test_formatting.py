import pytest
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sppo_lightning.data.formatting import PromptFormat
from sppo_lightning.data.layouts import RowError
from sppo_lightning.errors import InputError
from sppo_lightning.sft import closed

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


# of Qwen2-Instruct, as it comes with the model
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as DeepSeek-R1's distilled models do it: the generation prompt opens a thought, which a turn of the past loses
R1 = (
    "{% for message in messages %}{% if message.role == 'user' %}<|User|>{{ message.content }}{% else %}"
    "<|Assistant|>{{ message.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@pytest.fixture
def make_bytes():
    """A byte-level tokenizer with the special tokens of a chat, of which `eos` is the end of a sequence."""

    def make(template, eos):
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(["What is six times seven?"], vocab_size=270, show_progress=False)
        more = ["<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<eos>"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=eos, pad_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": more})
        tokenizer.chat_template = template
        return tokenizer

    return make


def learned(tokenizer, question, answer, ends):
    """The completion that is learned, as text: of the ids that SFTModule would train on."""
    chat = PromptFormat(tokenizer)
    prompt, turns = chat.render(question)
    text, turn = (answer, None) if isinstance(answer, str) else (answer["content"], answer)
    completion = chat.completion(prompt, turns, text, turn)
    ids = closed(tokenizer(completion, add_special_tokens=False)["input_ids"], ends, tokenizer.eos_token_id)
    return prompt, chat.encode([prompt])[0], ids


@pytest.mark.parametrize("eos", ["<|im_end|>", "<eos>"])
def test_a_turn_is_what_the_template_has_behind_its_generation_prompt(make_bytes, eos):
    tokenizer = make_bytes(QWEN2, eos)
    question, answer = ({"role": "user", "content": "six times seven?"},), {"role": "assistant", "content": " 42 "}
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]  # as in a generation config
    for shown in (answer, " 42 "):
        prompt, prompt_ids, ids = learned(tokenizer, question, shown, ends)
        assert tokenizer.decode(ids) == " 42 <|im_end|>"
        # the whole conversation, tokenized at once, begins with exactly these ids
        whole = tokenizer.apply_chat_template([*question, answer], tokenize=False)
        everything = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert everything[: len(prompt_ids + ids)] == prompt_ids + ids
        assert tokenizer.decode(everything[len(prompt_ids + ids) :]) == "\n"
    # where the turn's end does not end the sequence, both are learned
    _, _, ids = learned(tokenizer, question, " 42 ", [tokenizer.eos_token_id])
    assert tokenizer.decode(ids) == " 42 <|im_end|>" + ("" if eos == "<|im_end|>" else "<eos>")


def test_what_the_generation_prompt_has_opened_is_not_opened_again(make_bytes):
    tokenizer = make_bytes(R1, "<eos>")
    question = ({"role": "user", "content": "six times seven?"},)
    thought = {"role": "assistant", "content": "<think>\nby heart\n</think>\n42"}
    prompt, _, ids = learned(tokenizer, question, thought, [tokenizer.eos_token_id])
    assert prompt.endswith("<|Assistant|><think>\n")
    assert tokenizer.decode(ids) == "by heart\n</think>\n42<eos>"


def test_plain_text_and_templates_without_an_end_leave_the_text_alone(tokenizer, chat_tokenizer):
    turn = {"role": "assistant", "content": "three"}
    assert PromptFormat(tokenizer).completion("two", (USER,), "three", turn) == "three"
    chat = PromptFormat(chat_tokenizer)
    prompt, turns = chat.render((USER,))
    assert chat.completion(prompt, turns, "three", None) == "three"
    assert chat.completion(prompt, turns, "three", turn) == " three"


def test_a_template_that_refuses_the_turn_is_a_bad_row(make_tokenizer):
    strict = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('ask!') }}{% endif %}{{ messages[-1].content }}"
    )
    chat = PromptFormat(make_tokenizer(strict))
    prompt, turns = chat.render((USER,))
    with pytest.raises(RowError, match=r"the chat template refuses the messages \(ask!\)"):
        chat.completion(prompt, turns, "three", {"role": "assistant", "content": "three"})
    assert chat.completion(prompt, turns, "three", None) == "three"
