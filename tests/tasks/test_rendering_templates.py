"""Every chat template that trl carries: what is learned, against trl's own marks and against what the answers were."""

from collections.abc import Callable

import pytest
from chats import PLACE, VERSION, stock, template, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.data.conversations import Example, Message
from fedlora.tasks.rendering import MARKS, render

IMAGES = {"idefics3", "smolvlm", "llava_next"}  # read lists of parts, not texts
DATED = {"llama3_2", "gptoss", "muse_glimmer"}  # write today's date

Said = Callable[[list[str]], str]  # the contents of the assistant's turns -> all that is learned


def each(end: str, before: str = "") -> Said:
    return lambda contents: "".join(f"{before}{content}{end}" for content in contents)


def last(first: str, then: str, end: str = "") -> Said:
    """Something else around the last turn."""

    def said(contents: list[str]) -> str:
        *earlier, final = contents
        return "".join(first.format(content) for content in earlier) + then.format(final) + end

    return said


THINK = "\n</think>\n\n{}<|im_end|>"
LEARNED: dict[str, Said] = {
    "chatml": each("<|im_end|>"),
    "mistral": each("</s>", " "),
    "forced": last(" {}", " {}\n</s>"),
    "cohere": each("<|END_OF_TURN_TOKEN|>"),
    "cohere2": each("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": each("<｜end▁of▁sentence｜>"),
    "deepseekv3": each("<｜end▁of▁sentence｜>"),
    **{name: each("<turn|>") for name in ("diffusion_gemma", "gemma4", *(f"gemma4_v{n}" for n in range(2, 6)))},
    "gemma": each("<end_of_turn>"),
    "gemma3": each("<end_of_turn>"),
    "glm4moe": last("\n<think></think>\n{}", "\n<think></think>\n{}</s>"),
    "gptoss": last("<|channel|>final<|message|>{}<|end|>", "<|channel|>final<|message|>{}<|return|>"),
    "lfm2": each("<|im_end|>"),
    "lfm2_v2": each("<|im_end|>"),
    **{name: each("<|im_end|>\n") for name in ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")},
    **{name: each("<|eot_id|>") for name in ("llama3", "llama3_1", "llama3_2")},
    "muse_glimmer": each("<|eot|>", " to=user<|message|>"),
    **{f"nemotron_3_{name}": each("<|im_end|>") for name in ("nano", "super", "ultra", "5_lightning")},
    "phi3": each("<|end|>"),
    "phi3_5": each("<|end|>"),
    **{name: each("<|im_end|>") for name in ("qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl")},
    "qwen3": last("{}<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
    "qwen3_5_nothink": each("<|im_end|>"),
    "qwen3_5_think": last("{}<|im_end|>", THINK),
    "qwen3_6": last("{}<|im_end|>", THINK),
    "qwen3_8": each("<|im_end|>", "\n</think>\n\n"),
}

texts = st.text(alphabet="ab <|>\n{}[]:#«»é😀\\'\"", min_size=1, max_size=12).map(str.strip).filter(bool)


def test_all_templates_are_here() -> None:
    assert stock(), f"no chat templates in {PLACE}: scripts/setup puts trl {VERSION} there"
    assert set(stock()) == set(LEARNED) - {"chatml", "mistral", "forced"} | IMAGES


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_are_the_answers_and_their_ends(name: str) -> None:
    words = tokenizer(template(name))

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.none() | texts)
    def holds(turns: list[tuple[str, str]], system: str | None) -> None:
        first = [] if system is None else [Message("system", system)]
        said = [message for user, assistant in turns for message in (Message("user", user), Message("assistant", assistant))]
        rendered = render(words, Example("chat", (*first, *said)))
        assert rendered.fault == ""
        learned = words.decode(rendered.ids[rendered.trained], clean_up_tokenization_spaces=False)
        assert learned == LEARNED[name]([assistant for _, assistant in turns])
        if name not in DATED and (system is None or name not in ("gemma", "mistral")):
            messages = [message._asdict() for message in (*first, *said)]
            plain = words.apply_chat_template(messages, tokenize=True)["input_ids"]
            assert rendered.ids.tolist()[: len(plain)] == plain  # behind it, an end that the template lacks

    holds()


# The templates of which trl marks as learned what we learn, but for a line break behind the end of a turn. Of the others, it marks
# the generation prompt, too, or writes thoughts where the stock template does not.
ALIKE = [
    *("cohere", "diffusion_gemma", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3"),
    *("qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"),
]


@pytest.mark.parametrize("name", ALIKE)
def test_trl_marks_the_same_tokens(name: str) -> None:
    turns = (("user", "hi"), ("assistant", "Four |é"), ("user", "why?"), ("assistant", "t|>"))
    example = Example("chat", tuple(Message(*turn) for turn in turns))
    both = template(name), template(f"{name}_training")
    stock, marked = (tokenizer("".join(both)) for _ in both)
    stock.chat_template, marked.chat_template = both
    assert MARKS.search(marked.chat_template) and not MARKS.search(stock.chat_template)
    messages = [message._asdict() for message in example.messages]
    theirs = marked.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    own, ours = render(marked, example), render(stock, example)
    assert own.ids.tolist() == theirs["input_ids"] == ours.ids.tolist()
    assert own.trained.tolist() == list(map(bool, theirs["assistant_masks"]))
    more = own.trained & ~ours.trained
    assert not (ours.trained & ~own.trained).any() and set(stock.decode(own.ids[more])) <= {"\n"}
