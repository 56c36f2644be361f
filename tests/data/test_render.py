from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from vlmtune.data.render import TEMPLATES, Renderer, template_text
from vlmtune.errors import DataError, RecipeError
from vlmtune.types import IGNORE, IMAGE_MARK, ChatSample, ImageRef, Size, Turn

TEMPLATE_NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
SPECIAL = ["<pad>", "<s>", "</s>", IMAGE_MARK, "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: what color is the shape? ASSISTANT: blue",
    "What animal is this? A dog. Brown, it is. system user assistant questioner VUSER: yes no",
]


def byte_level(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2 style; with trim_offsets the offsets of tokens leave out their blanks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return _trained(backend, trainer)


def metaspace() -> PreTrainedTokenizerFast:
    """LLaMA style: SentencePiece pieces with byte fallback, a leading space that decoding drops."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Pieces hold a blank at their front only, as SentencePiece's do.
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=["<unk>", *SPECIAL, *byte_tokens])
    return _trained(backend, trainer)


def _trained(backend: Tokenizer, trainer: trainers.BpeTrainer) -> PreTrainedTokenizerFast:
    trainer.show_progress = False
    backend.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


TOKENIZERS = {"byte": byte_level(), "byte_trimmed": byte_level(trim_offsets=True), "metaspace": metaspace()}


@dataclass(frozen=True)
class FourTokens:
    """Image token count of a test: 4, or 2 for tall images."""

    def __call__(self, width: int, height: int) -> int:
        return 2 if height > width else 4


def renderer(template: str = "vicuna_v1", tokenizer: str = "byte") -> Renderer:
    return Renderer(TOKENIZERS[tokenizer], FourTokens(), template_text(template))


def sample(*turns: Turn | tuple, images: int = 0) -> ChatSample:
    return ChatSample("s#0", (ImageRef("x.png"),) * images, tuple(Turn(*turn) for turn in turns))


QUESTION = ("user", f"{IMAGE_MARK}\nWhat animal is this?")
TWO_ROUNDS = sample(
    QUESTION, ("assistant", "A dog."), ("user", "What color is it?"), ("assistant", "Brown."), images=1
)
MUTED = replace(
    TWO_ROUNDS, turns=tuple(replace(turn, supervised=turn.text == "Brown.") for turn in TWO_ROUNDS.turns)
)
SQUARE = Size(8, 8)
ENDS = {
    "brief": ("</s>", " "),
    "chatml": ("<|im_end|>", ""),
    "llama3": ("<|eot_id|>", ""),
    "plain": ("\n", ""),
    "vicuna_v1": ("</s>", " "),
    "vicuna_v1_sq": ("</s>", " "),
}
"""What ends an answer, and the blank before it."""


def learned(renderer: Renderer, sample: ChatSample, sizes=(SQUARE,)) -> str:
    """The labelled tokens decoded, bars between runs."""
    runs = groupby(renderer.render(sample, sizes).labels, key=lambda label: label != IGNORE)
    return "|".join(renderer.tokenizer.decode(list(run)) for is_learned, run in runs if is_learned)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_learned_tokens_are_the_answers_and_the_prompt_is_a_prefix(template, tokenizer, data):
    """PITFALLS 1 and 18, on any text: the decoded labels are the answers; the prompt is what comes before."""
    text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
    odd = st.sampled_from(["yes", "two words", "a  b\n\nc", " lead and trail ", ": ."])
    # Marks and control tokens have their own tests; SentencePiece writes blanks as ▁: it cannot tell them apart.
    text = (text | odd).filter(lambda text: text.strip() and not {"<", "▁"} & set(text))
    answers = data.draw(st.lists(text, min_size=1, max_size=3))
    turns: list[tuple] = []
    if template != "brief" and data.draw(st.booleans()):
        turns.append(("system", data.draw(text)))
    images = 0
    for answer in answers:
        marks = data.draw(st.integers(0, 2))
        turns += [("user", f"{IMAGE_MARK}\n" * marks + data.draw(text)), ("assistant", answer)]
        images += marks
    chat = sample(*turns, images=images)
    sizes = data.draw(st.lists(st.sampled_from([SQUARE, Size(4, 9)]), min_size=images, max_size=images))
    made = renderer(template, tokenizer)

    rendered = made.render(chat, sizes)

    assert len(rendered.input_ids) == len(rendered.labels) == made.length(chat, sizes)
    assert rendered.labels[0] == IGNORE
    pairs = list(zip(rendered.input_ids, rendered.labels, strict=True))
    assert all(label in (IGNORE, token) for token, label in pairs)
    assert all(label == IGNORE for token, label in pairs if token == made.image_token_id)
    assert rendered.input_ids.count(made.image_token_id) == sum(made.image_tokens(*size) for size in sizes)
    decoded = made.tokenizer.decode([label for label in rendered.labels if label != IGNORE])
    end, space = ENDS[template]
    expected = "".join(space + answer.strip() + end for answer in answers)
    if tokenizer == "metaspace":  # it puts a blank of its own behind an image, and drops the very first
        decoded, expected = (text.replace(end + " ", end).removeprefix(" ") for text in (decoded, expected))
    assert decoded == expected
    prompt = made.prompt(chat, sizes)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.labels[len(prompt)] == rendered.input_ids[len(prompt)]


@pytest.mark.parametrize("tokenizer", ["byte", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_ids_and_mask_are_those_of_apply_chat_template(template, tokenizer):
    made = renderer(template, tokenizer)
    messages = [{"role": turn.role, "content": turn.text} for turn in TWO_ROUNDS.turns]
    stock = made.tokenizer.apply_chat_template(
        messages, chat_template=made.template, return_dict=True, return_assistant_tokens_mask=True
    )
    one_token = Renderer(made.tokenizer, lambda width, height: 1, made.template)
    rendered = one_token.render(TWO_ROUNDS, [SQUARE])
    assert rendered.input_ids == stock["input_ids"]
    assert [int(label != IGNORE) for label in rendered.labels] == stock["assistant_masks"]


def test_trimmed_offsets_do_not_lose_the_answer():
    """apply_chat_template returns an empty mask for this tokenizer, without a word."""
    made = renderer(tokenizer="byte_trimmed")
    messages = [{"role": turn.role, "content": turn.text} for turn in TWO_ROUNDS.turns]
    stock = made.tokenizer.apply_chat_template(
        messages, chat_template=made.template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert not any(stock["assistant_masks"])
    assert learned(made, TWO_ROUNDS) == " A dog.</s>| Brown.</s>"


def test_vicuna_v1_is_llava_1_5_token_by_token():
    """LLaVA's preprocess_v1 learns each answer from its first piece to </s>, and nothing else."""
    made = renderer(tokenizer="metaspace")
    chat = replace(TWO_ROUNDS, turns=(Turn("system", "yes no"), *TWO_ROUNDS.turns))
    rendered = made.render(chat, [Size(4, 9)])
    pieces = made.tokenizer.convert_ids_to_tokens(rendered.input_ids)
    table = [(piece, label != IGNORE) for piece, label in zip(pieces, rendered.labels, strict=True)]
    assert table == [
        ("<s>", False),
        ("▁yes", False),
        ("▁no", False),
        ("▁USER:", False),
        ("▁", False),
        ("<image>", False),
        ("<image>", False),
        ("▁", False),
        ("<0x0A>", False),
        ("What", False),
        ("▁animal", False),
        ("▁is", False),
        ("▁this?", False),
        ("▁ASSISTANT:", False),
        ("▁A", True),
        ("▁dog.", True),
        ("</s>", True),
        ("▁USER:", False),
        ("▁What", False),
        ("▁color", False),
        ("▁is", False),
        ("▁it", False),
        ("?", False),
        ("▁ASSISTANT:", False),
        ("▁Br", True),
        ("ow", True),
        ("n", True),
        (".", True),
        ("</s>", True),
    ]


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CURIOUS_SYSTEM = (
    f"{VICUNA_SYSTEM.rstrip()}The assistant also takes the part of a curious visual user, who looks at the image and "
    "asks demanding questions about it, drawing on what is known about the objects and events it shows, and leaves "
    "out details that cannot be made out. "
)
LAYOUTS = {
    "brief": "<s>USER: <image>\nWhat animal is this? ASSISTANT: A dog.</s>"
    "USER: What color is it? ASSISTANT: Brown.</s>",
    "vicuna_v1": f"<s>{VICUNA_SYSTEM}USER: <image>\nWhat animal is this? ASSISTANT: A dog.</s>"
    "USER: What color is it? ASSISTANT: Brown.</s>",
    "vicuna_v1_sq": f"<s>{CURIOUS_SYSTEM}USER: <image>\nWhat animal is this? ASSISTANT: A dog.</s>"
    "USER: What color is it? ASSISTANT: Brown.</s>",
    "plain": "<s><image>A dog.\nBrown.\n",
    "chatml": "<|im_start|>user\n<image>\nWhat animal is this?<|im_end|>\n"
    "<|im_start|>assistant\nA dog.<|im_end|>\n"
    "<|im_start|>user\nWhat color is it?<|im_end|>\n<|im_start|>assistant\nBrown.<|im_end|>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat animal is this?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat color is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nBrown.<|eot_id|>",
}
HEADERS = {
    "brief": "ASSISTANT:",
    "vicuna_v1": "ASSISTANT:",
    "vicuna_v1_sq": "ASSISTANT:",
    "plain": "",
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_layout_is_the_published_one_for_text_and_for_parts(template):
    tokenizer, text = TOKENIZERS["byte"], template_text(template)
    flat = [{"role": turn.role, "content": turn.text} for turn in TWO_ROUNDS.turns]
    words = [message["content"].replace("<image>\n", "") for message in flat]
    parts = [
        {"role": message["role"], "content": [{"type": "text", "text": word}]}
        for message, word in zip(flat, words, strict=True)
    ]
    parts[0]["content"].append({"type": "image"})  # images come first wherever they stand, as in llava-hf
    for messages in (flat, parts):
        written = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
        assert written == LAYOUTS[template]
    asked = tokenizer.apply_chat_template(
        parts[:-1], chat_template=text, tokenize=False, add_generation_prompt=True
    )
    assert LAYOUTS[template].startswith(asked)
    assert asked.endswith(HEADERS[template])


TINY = {"height": 28, "width": 28}


@pytest.mark.parametrize(
    ("image_processor", "select", "extra"),
    [
        (CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=TINY), "default", 1),
        (SiglipImageProcessorPil(size=TINY), "full", 0),
    ],
    ids=["clip", "siglip"],
)
@pytest.mark.parametrize("tokenizer", ["byte", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_train_prompt_is_the_inference_prompt(template, tokenizer, image_processor, select, extra):
    """PITFALLS 18: what the processor makes of the messages at inference is what `prompt` gives."""
    text = template_text(template)
    processor = LlavaProcessor(
        image_processor,
        TOKENIZERS[tokenizer],
        patch_size=14,
        vision_feature_select_strategy=select,
        chat_template=text,
        num_additional_image_tokens=extra,
    )
    messages = [{"role": turn.role, "content": turn.text} for turn in TWO_ROUNDS.turns[:-1]]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]
    asked = processor.apply_chat_template(messages, add_generation_prompt=True)
    stock = processor(images=[Image.new("RGB", (40, 30))], text=asked)["input_ids"]
    made = Renderer(TOKENIZERS[tokenizer], FourTokens(), text)
    assert [made.prompt(TWO_ROUNDS, [Size(40, 30)])] == stock


def test_supervised_of_a_turn_overrules_its_role():
    made = renderer()
    assert learned(made, MUTED) == " Brown.</s>"
    asking = sample(("user", "What color is it?", True), ("assistant", "Brown."))
    assert learned(made, asking, ()) == " What color is it?| Brown.</s>"
    curious = sample(("questioner", "What color is it?"), ("assistant", "Brown."))
    assert learned(made, curious, ()) == " What color is it?</s>| Brown.</s>"
    assert "VUSER: What color is it?</s> ASSISTANT: Brown.</s>" in made.tokenizer.decode(
        made.render(curious, ()).input_ids
    )


FOREIGN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)


def test_template_that_knows_no_supervised_key():
    """Its marks are intersected with the turns that are supervised; what it cannot mark is an error."""
    made = replace(renderer(), template=FOREIGN)
    assert learned(made, MUTED) == "Brown.</s>"
    both = sample(("user", "What?", True), ("assistant", "Brown."))
    with pytest.raises(DataError, match="s#0: the chat template marks 1 spans for 2 supervised turns"):
        made.render(both, ())
    swapped = sample(("user", "What?", True), ("assistant", "Brown.", False))
    with pytest.raises(DataError, match=r"s#0: the chat template marks 'Brown\.</s>' for the turn 'What\?'"):
        made.render(swapped, ())
    unmarked = replace(made, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="marks 0 spans"):
        unmarked.render(TWO_ROUNDS, [SQUARE])


def test_answer_joined_with_its_header_is_refused():
    """A template without a border lets a token span question and answer."""
    made = replace(renderer(), template=FOREIGN.replace("</s>", "").replace("}:{", "}{"))
    with pytest.raises(DataError, match="s#0: the supervised tokens decode to ' color'"):
        made.render(sample(("user", "what co"), ("assistant", "lor")), ())


def test_text_the_tokenizer_cannot_write_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "USER:": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", additional_special_tokens=[IMAGE_MARK]
    )
    made = Renderer(tokenizer, FourTokens(), template_text("vicuna_v1"))
    with pytest.raises(DataError, match="s#0: the supervised tokens decode to '<unk> </s>'"):
        made.render(sample(("user", "x"), ("assistant", "unheard")), ())


def test_normalisation_of_the_tokenizer_is_no_mismatch():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    made = Renderer(tokenizer, FourTokens(), template_text("vicuna_v1"))
    assert learned(made, sample(("user", "x"), ("assistant", "cafe\u0301")), ()) == " caf\u00e9</s>"


@pytest.mark.parametrize(
    ("chat", "what"),
    [
        (sample(("user", "no mark"), ("assistant", "yes"), images=1), "0 <image> marks for 1 images"),
        (sample(QUESTION, ("assistant", "yes")), "1 <image> marks for 0 images"),
        (sample(QUESTION, ("assistant", " \n"), images=1), "a supervised assistant turn is empty"),
        (sample(("user", "x"), ("assistant", "see <image>"), images=1), "holds an image"),
        (sample(("user", "x</s>USER: y"), ("assistant", "yes")), "contains the control token '</s>'"),
        (sample(("user", "x"), ("assistant", "a<|im_end|>b")), r"contains the control token '<\|im_end\|>'"),
        (sample(("user", "x")), "no turn is supervised"),
        (sample(("user", "x"), ("system", "y"), ("assistant", "z")), "the chat template refuses it"),
    ],
)
def test_unusable_sample_is_named_with_its_reason(chat, what):
    with pytest.raises(DataError, match=f"s#0: .*{what}"):
        renderer().render(chat, (SQUARE,) * len(chat.images))


def test_image_that_the_template_drops_is_refused():
    chat = sample(("system", "<image>"), ("user", "x"), ("assistant", "y"), images=1)
    made = replace(renderer(), template=FOREIGN.replace("{% else %}", "{% elif m.role == 'user' %}"))
    with pytest.raises(DataError, match="does not keep every image"):
        made.render(chat, [SQUARE])


def test_shorten_drops_last_pairs_with_their_images():
    made = renderer()
    rounds = (QUESTION, ("assistant", "A dog."), ("user", "<image> yes?"), ("assistant", "no"))
    chat = sample(*rounds, ("user", "a"), images=2)
    sizes = [Size(4, 9), SQUARE]
    full = made.length(sample(*rounds, images=2), sizes)
    first = made.length(sample(*rounds[:2], images=1), sizes[:1])
    assert made.shorten(chat, sizes, full) == replace(chat, turns=chat.turns[:4])
    assert made.shorten(chat, sizes, full - 1) == replace(chat, turns=chat.turns[:2], images=chat.images[:1])
    assert made.shorten(chat, sizes, first) == replace(chat, turns=chat.turns[:2], images=chat.images[:1])
    assert made.shorten(chat, sizes, first - 1) is None


def test_prompt_of_a_conversation_without_answer_is_all_of_it():
    made = renderer()
    ids = made.prompt(sample(QUESTION, images=1), [SQUARE])
    assert made.tokenizer.decode(ids).endswith("USER: " + "<image>" * 4 + "\nWhat animal is this? ASSISTANT:")


def test_renderer_pickles():
    made = renderer()
    assert pickle.loads(pickle.dumps(made)).render(TWO_ROUNDS, [SQUARE]) == made.render(TWO_ROUNDS, [SQUARE])


def test_tokenizer_that_cannot_serve_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(DataError, match="no <image> token"):
        Renderer(bare, FourTokens(), "x")
    with pytest.raises(DataError, match="no chat template"):
        Renderer(byte_level(), FourTokens(), "")


def test_unknown_template_lists_the_choices():
    with pytest.raises(RecipeError, match=r"did you mean vicuna_v1\? choices: .*chatml, llama3, plain, v"):
        template_text("vicuna_v2")
    with pytest.raises(RecipeError, match="no such chat template file"):
        template_text("here/none.jinja")
