"""The checkpoint that ships inside the package: complete, small, and right about what it was taught.

Transformers runs it here: this is the truth about the shipped weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuseline

DEMO = Path(fuseline.__file__).parent / "demo"
MAX_BYTES = 8_000_000
MIN_MARGIN = 0.5  # logits, at every token of every answer below; rounding of bfloat16 moves them by less than 0.1
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather", "parameters": CITY},
}
ANSWERS = {
    "Hello!": "Hello! How can I help you today?",
    "What is your name?": "I am the fuseline demo model.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "What colour is the sky?": "The sky is blue.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What day comes after Monday?": "Tuesday comes after Monday.",
    "What is the largest planet?": "The largest planet in the solar system is Jupiter.",
    "Who wrote Hamlet?": "Hamlet was written by William Shakespeare.",
    "What is a baby dog called?": "A baby dog is called a puppy.",
    "What is 2 + 2?": "2 + 2 = 4",
    "Count from 1 to 5.": "1, 2, 3, 4, 5",
    "List the days of the week.": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "What is the capital of Italy? Answer as JSON.": '{"country": "Italy", "capital": "Rome"}',
    "Thank you!": "You are welcome!",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, attn_implementation="eager", dtype="auto").eval()


def reply(model, tokenizer, messages: list[dict], **template) -> tuple[str, float]:
    """(text up to the end of the turn, the smallest distance of the two highest logits on the way)."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=100,
                             output_logits=True, return_dict_in_generate=True)  # fmt: skip
    new = out.sequences[0, ids.shape[1] :].tolist()
    assert new[-1] == tokenizer.eos_token_id
    top = torch.cat(out.logits).float().topk(2).values
    return tokenizer.decode(new, skip_special_tokens=True), (top[:, 0] - top[:, 1]).min().item()


def ask(model, tokenizer, question: str, **template) -> str:
    return reply(model, tokenizer, [{"role": "user", "content": question}], **template)[0]


def test_files_are_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(sizes) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(sizes.values()) <= MAX_BYTES


def test_configs(tokenizer) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["head_dim"] % 16 == 0 and config["max_position_embeddings"] == 2048
    ends = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == config["vocab_size"]


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


HARD = ["héllo wörld", "日本語のテキスト", "👩‍👩‍👧‍👦 🦊", "a\n\n  b\t c", "\u0000\ufeff\u200b", "12345 - 6"]


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_byte_is_a_token(tokenizer) -> None:
    from tokenizers import pre_tokenizers

    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


def test_markers_are_single_tokens_and_only_the_frame_is_special(tokenizer) -> None:
    for token in SPECIAL + MARKERS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL + MARKERS))
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "".join(MARKERS)


def test_template_renders_turns_tools_and_thinking(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSunny."},
        {"role": "user", "content": "Thanks"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[WEATHER], add_generation_prompt=True, tokenize=False)
    system = "<|im_start|>system\nBe brief.\n\nYou can call these tools:\n<tools>\n"
    assert text.startswith(system + json.dumps(WEATHER))
    assert text.endswith(
        "<|im_start|>user\nWeather in Rome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"
    )
    user = [{"role": "user", "content": "Hi"}]
    plain = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    off = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    on = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert off == plain + "<think>\n\n</think>\n"
    assert on == "<|im_start|>system\nThink before you answer.<|im_end|>\n" + plain


@pytest.mark.parametrize("question", list(ANSWERS))
def test_answers_are_right_and_decided(model, tokenizer, question: str) -> None:
    answer, margin = reply(model, tokenizer, [{"role": "user", "content": question}])
    assert answer == ANSWERS[question]
    assert margin > MIN_MARGIN


def test_calls_a_tool_and_reads_its_response(model, tokenizer) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    text, margin = reply(model, tokenizer, messages, tools=[WEATHER])
    body = text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert margin > MIN_MARGIN
    messages += [
        {"role": "assistant", "content": text},
        {"role": "tool", "content": '{"weather": "sunny", "temperature": 21}'},
    ]
    assert reply(model, tokenizer, messages, tools=[WEATHER])[0] == "The weather in Paris is sunny with 21 degrees."


def test_thinks_when_asked(model, tokenizer) -> None:
    text = ask(model, tokenizer, "What is the capital of Spain? Think step by step.")
    assert text.startswith("<think>\n") and text.endswith("\n</think>\n\nThe capital of Spain is Madrid.")
    on = ask(model, tokenizer, "What is the capital of Spain?", enable_thinking=True)
    assert on.startswith("<think>\n") and on.endswith("The capital of Spain is Madrid.")
    off = ask(model, tokenizer, "What is the capital of Spain?", enable_thinking=False)
    assert off.lstrip("\n") == "The capital of Spain is Madrid."


def test_remembers_the_conversation(model, tokenizer) -> None:
    messages = [
        {"role": "user", "content": "My name is Anna."},
        {"role": "assistant", "content": "Nice to meet you, Anna!"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert reply(model, tokenizer, messages)[0] == "Your name is Anna."


def test_long_conversation_stays_sensible(model, tokenizer) -> None:
    """24 turns, twice as many as in the longest training samples."""
    messages = []
    for question, answer in [*ANSWERS.items()] + [*ANSWERS.items()][:8]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "What is the capital of Germany?"})
    assert reply(model, tokenizer, messages)[0] == "The capital of Germany is Berlin."


def test_completes_plain_text(model, tokenizer) -> None:
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == " Paris."
