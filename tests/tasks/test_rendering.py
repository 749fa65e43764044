"""Examples as token ids and what of them is learned, against spans marked by hand and against what transformers makes of them."""

import numpy as np
import pytest
from chats import Slow, marked, same, template, tokenizer

from fedlora.data.conversations import Example, Message
from fedlora.errors import BadInput
from fedlora.tasks.rendering import Rendered, choices, prompt_ids, render, shown


def chat(*contents: str, system: str | None = None) -> Example:
    """Turns of user and assistant, the user's first."""
    turns = [Message(("user", "assistant")[at % 2], content) for at, content in enumerate(contents)]
    return Example("chat", (*([] if system is None else [Message("system", system)]), *turns))


def pair(prompt: str, completion: str) -> Example:
    return Example("completion", completion, prompt)


# ---- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (Example("text", "ab c"), "a«b c</s>»"),
        (pair("ab ", "cd"), "ab «cd</s>»"),
        (pair("ab", " cd"), "ab« cd</s>»"),
        (pair("", "cd"), "c«d</s>»"),  # nothing stands before the first token
        (pair("é😀", "😀é"), "é😀«😀é</s>»"),
        (pair("ab", "cd</s>"), "ab«cd</s>»"),  # not ended twice
    ],
)
def test_texts_end_and_the_completion_is_learned(example: Example, expected: str) -> None:
    words = tokenizer()
    rendered = render(words, example)
    assert same(rendered, marked(words, expected)) and rendered.fault == "" and not rendered.cut
    assert rendered.text == f"{example.prompt}{example.completion}"
    begun = tokenizer(bos=True)
    first = expected.replace("«", "") if example.kind == "text" else expected
    whole = f"<s>«{first}" if example.kind == "text" or not example.prompt else f"<s>{expected}"
    whole = whole.replace("<s>«c«d", "<s>«cd")
    assert same(render(begun, example), marked(begun, whole))


def test_a_token_across_the_boundary_belongs_to_the_completion() -> None:
    words = tokenizer(merges=[("b", "c")])
    rendered = render(words, pair("ab", "cd"))
    assert rendered.ids.tolist() == words.convert_tokens_to_ids(["a", "bc", "d", "</s>"])
    assert rendered.trained.tolist() == [False, True, True, True]


def test_spaces_that_offsets_leave_out() -> None:
    words = tokenizer(merges=[("Ġ", "a")])  # its offsets begin behind the space
    for prompt, completion, count in (
        ("x", " ab", 3),
        ("x ", "ab", 3),
        ("x", "  ab", 4),
        ("x  ", "ab", 3),
        ("x", " \nab", 5),
        ("x", "a ", 3),
    ):
        assert render(words, pair(prompt, completion)).trained.sum() == count, (prompt, completion)


def test_the_beginning_is_written_once() -> None:
    words = tokenizer(bos=True)
    assert same(render(words, pair("<s>a", "b")), marked(words, "<s>a«b</s>»"))
    assert prompt_ids(words, pair("<s>a", "b")).tolist() == marked(words, "<s>a")[0]


def test_a_tokenizer_that_ends_texts_itself() -> None:
    from tokenizers import processors

    words = tokenizer()
    end = words.eos_token_id
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    assert words("ab")["input_ids"][-1] == end
    assert same(render(words, pair("a", "b")), marked(words, "a«b</s>»"))
    assert prompt_ids(words, pair("ab", "c")).tolist() == marked(words, "ab")[0]
    assert same(render(words, pair("a", "b"), end=False), marked(words, "a«b»"))


def test_faults_of_texts() -> None:
    words = tokenizer()
    assert render(words, pair("ab", "")).fault == "empty answer" == render(words, pair("ab", " \n")).fault
    assert render(words, Example("text", "")).fault == "empty text" and not render(words, Example("text", " ")).trained.any()


@pytest.mark.parametrize(
    ("limit", "expected", "fault", "cut"),
    [
        (5, "ab«cd</s>»", "", False),
        (4, "ab«cd»", "", True),
        (3, "ab«c»", "", True),
        (2, "ab", "the prompt fills the 2 tokens", False),
        (1, "a", "the prompt fills the 1 tokens", False),
    ],
)
def test_cutting_keeps_the_start(limit: int, expected: str, fault: str, cut: bool) -> None:
    words = tokenizer()
    rendered = render(words, pair("ab", "cd"), limit)
    assert same(rendered, marked(words, expected)) and (rendered.fault, rendered.cut) == (fault, cut)


def test_a_tokenizer_without_an_end() -> None:
    words = tokenizer()
    words.eos_token = None
    with pytest.raises(BadInput, match=r"no end-of-text token \(eos_token\)"):
        render(words, pair("a", "b"))


# ---- chats -------------------------------------------------------------------------------------------------------------

ONE = chat("hi", "Four")
TWO = chat("hi", "a", "why?", "t|>", system="Be brief.")
THOUGHTS = chat("hi", "<think>\nhm\n</think>\n\nA1", "more", "<think>\nwell\n</think>\n\nA2")
L = ("<|start_header_id|>", "<|end_header_id|>\n\n")
HAND = [
    ("chatml", ONE, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«Four<|im_end|>»\n"),
    (
        "chatml",
        TWO,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n"
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n«t|><|im_end|>»\n",
    ),
    ("mistral", ONE, "<s>[INST] hi[/INST]« Four</s>»"),
    # It leaves the system's text out, for the last turn is the assistant's: so that begins the user's.
    ("mistral", TWO, "<s>[INST] Be brief.\n\nhi[/INST]« a</s>»[INST] why?[/INST]« t|></s>»"),
    ("forced", ONE, "SYSTEM: Be kind.\nUSER: hi\nASSISTANT:« Four\n</s>»"),
    ("forced", TWO, "SYSTEM: Be brief.\nUSER: hi\nASSISTANT:« a»\nUSER: why?\nASSISTANT:« t|>\n</s>»"),
    ("llama3", ONE, f"<s>{L[0]}user{L[1]}hi<|eot_id|>{L[0]}assistant{L[1]}«Four<|eot_id|>»"),
    (
        "llama3",
        TWO,
        f"<s>{L[0]}system{L[1]}Be brief.<|eot_id|>{L[0]}user{L[1]}hi<|eot_id|>{L[0]}assistant{L[1]}«a<|eot_id|>»"
        f"{L[0]}user{L[1]}why?<|eot_id|>{L[0]}assistant{L[1]}«t|><|eot_id|>»",
    ),
    (  # a system turn of its own, and the date of a clock that stands still
        "llama3_2",
        ONE,
        f"<s>{L[0]}system{L[1]}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        f"{L[0]}user{L[1]}hi<|eot_id|>{L[0]}assistant{L[1]}«Four<|eot_id|>»",
    ),
    (  # refuses a system turn
        "gemma",
        TWO,
        "<s><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n«a<end_of_turn>»\n"
        "<start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\n«t|><end_of_turn>»\n",
    ),
    ("gemma4", ONE, "<s><|turn>user\nhi<turn|>\n<|turn>model\n«Four<turn|>»\n"),
    (  # ends what is no prompt with its end of text, too
        "phi3",
        TWO,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n«a<|end|>»\n"
        "<|user|>\nwhy?<|end|>\n<|assistant|>\n«t|><|end|>»\n</s>",
    ),
    (
        "qwen2_5",
        ONE,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«Four<|im_end|>»\n",
    ),
    (  # thoughts stand in the last turn alone, even if there are none
        "qwen3",
        THOUGHTS,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n«<think>\nwell\n</think>\n\nA2<|im_end|>»\n",
    ),
    ("qwen3", ONE, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nFour<|im_end|>»\n"),
    (  # its generation prompt begins the thoughts
        "qwen3_5_think",
        THOUGHTS,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n<think>\n«well\n</think>\n\nA2<|im_end|>»\n",
    ),
    (
        "cohere",
        ONE,
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "«Four<|END_OF_TURN_TOKEN|>»",
    ),
    (  # a generation prompt that is no prefix: it begins thoughts, which the template strips
        "deepseek_r1_distill",
        THOUGHTS,
        "<s><｜User｜>hi<｜Assistant｜>«\n\nA1<｜end▁of▁sentence｜>»<｜User｜>more<｜Assistant｜>«\n\nA2<｜end▁of▁sentence｜>»",
    ),
    # Nothing ends an answer: the next turn does.
    ("glm4moe", ONE, "[gMASK]<sop><|user|>\nhi<|assistant|>«\n<think></think>\nFour</s>»"),
    ("lfm2_2_5", ONE, "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«Four<|im_end|>\n»"),  # marks of its own
]


@pytest.mark.parametrize(("name", "example", "expected"), HAND, ids=[f"{name}-{len(x.messages)}" for name, x, _ in HAND])
def test_by_hand(name: str, example: Example, expected: str) -> None:
    words = tokenizer(template(name))
    rendered = render(words, example)
    assert rendered.fault == "" and shown(rendered, words) == expected
    assert same(rendered, marked(words, expected))


def test_gpt_oss_ends_the_last_turn_otherwise() -> None:
    words = tokenizer(template("gptoss"))
    _, _, chats = shown(render(words, TWO), words).partition("<|start|>user")
    assert chats == (
        "<|message|>hi<|end|><|start|>assistant«<|channel|>final<|message|>a<|end|>»"
        "<|start|>user<|message|>why?<|end|><|start|>assistant«<|channel|>final<|message|>t|><|return|>»"
    )


def test_prompts_of_messages_are_given() -> None:
    for name in ("chatml", "gemma", "lfm2_2_5"):  # by the text, with a system turn that is merged, by marks
        words = tokenizer(template(name))
        turns = chat("hi", "a", "why?", "b", system="Be brief.").completion
        assert not isinstance(turns, str)
        rendered = render(words, Example("completion", turns[-1:], turns[:-1]))
        whole = render(words, Example("chat", turns))
        assert rendered.ids.tolist() == whole.ids.tolist()
        assert shown(rendered, words).count("«") == 1 and shown(whole, words).count("«") == 2
        assert shown(rendered, words).partition("«")[2] == shown(whole, words).rpartition("«")[2]


def test_what_a_model_is_given_before_it_answers() -> None:
    words = tokenizer(template("chatml"))
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_ids(words, ONE).tolist() == marked(words, asked)[0]
    assert prompt_ids(words, chat("hi")).tolist() == marked(words, asked)[0]
    assert prompt_ids(words, chat("hi", "a", "more", "b"))[: len(marked(words, asked)[0])].tolist() == marked(words, asked)[0]
    assert words.decode(prompt_ids(words, chat("hi", "a", "more"))).endswith(
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )
    gemma = tokenizer(template("gemma"))
    assert gemma.decode(prompt_ids(gemma, chat("hi", "b", system="Be brief."))) == (
        "<s><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompt_ids(words, pair("ab", "c")).tolist() == marked(words, "ab")[0]
    assert prompt_ids(words, Example("text", "ab")).tolist() == marked(words, "ab")[0]


def test_faults_of_chats() -> None:
    words = tokenizer(template("mistral"))
    assert render(words, chat("hi")).fault == "no assistant turn"
    assert render(words, chat("hi", " ")).fault == "empty answer" == render(words, chat("hi", "", "more", "b")).fault
    assert not render(words, chat("hi", " ")).trained.any()
    refused = Example("chat", (Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    assert render(words, refused).fault == "the chat template refuses it: Roles must alternate!"
    with pytest.raises(BadInput, match="refuses it: Roles must alternate!"):
        prompt_ids(words, refused)
    assert render(tokenizer(template("smolvlm")), ONE).fault == "the chat template leaves out or changes turn 2"  # it reads lists
    with pytest.raises(BadInput, match="no chat template, which messages need"):
        render(tokenizer(), ONE)
    assert render(words, chat("hi"), 5).fault == "no assistant turn"
    assert render(words, ONE, 5).fault == "the prompt fills the 5 tokens" and render(words, ONE, 11).cut


# ---- choices -----------------------------------------------------------------------------------------------------------


def test_choices_are_completions_without_an_end() -> None:
    words = tokenizer()
    example = Example("completion", "yes", "Q\n", choices=("yes", "no"), answer=0)
    given = choices(words, example)
    assert [same(each, marked(words, f"Q\n«{choice}»")) for each, choice in zip(given, ("yes", "no"), strict=True)] == [True, True]
    words = tokenizer(template("chatml"))
    example = Example("completion", (Message("assistant", "yes"),), (Message("user", "Q"),), choices=("yes", "no"), answer=0)
    asked = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    expected = [marked(words, f"{asked}«{choice}»<|im_end|>\n") for choice in ("yes", "no")]
    assert [same(*each) for each in zip(choices(words, example), expected, strict=True)] == [True, True]


# ---- tokenizers without offsets ----------------------------------------------------------------------------------------


def test_a_slow_tokenizer() -> None:
    words = Slow(bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    words.chat_template = template("chatml")
    assert not words.is_fast
    expected = marked(words, HAND[1][2])
    assert same(render(words, TWO), expected)
    assert same(render(words, pair("ab", "d")), marked(words, "ab«d</s>»"))
    across = render(words, pair("ab", "cd"))  # "bc" is one token
    assert across.ids.tolist() == words.convert_tokens_to_ids(["a", "bc", "d", "</s>"])
    assert across.trained.tolist() == [False, True, True, True]
    for each in (words, tokenizer(merges=[("b", "c")])):  # and across the end of an answer, whose end is not asked for
        each.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}c"
        rendered = render(each, chat("a", "b"), end=False)
        assert rendered.ids.tolist() == each.convert_tokens_to_ids(["a", "bc"]) and rendered.trained.tolist() == [False, True]


# ---- for people --------------------------------------------------------------------------------------------------------


def test_shown_is_what_the_tokens_are() -> None:
    words = tokenizer(bos=True)
    assert shown(render(words, pair("é ", "😀 b")), words) == "<s>é «😀 b</s>»"
    assert shown(render(words, pair("a", "bcd"), 3), words) == "<s>a«b»"
    assert shown(Rendered(np.zeros(0, np.int32), np.zeros(0, np.bool_), ""), words) == ""
    split = Rendered(np.array(words("é")["input_ids"][1:], np.int32), np.array([False, True]), "é")  # the bytes of one character
    assert shown(split, words) == "«é»"
