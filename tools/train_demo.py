"""Trains the bundled demo model from its generated corpus: `python tools/train_demo.py` (docs/DEMO.md).

The weights depend only on the seed, the number of steps and the machine: one generator draws the corpus, one
initializes the model, and nothing depends on the clock.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_corpus
import torch
from demo_corpus import Sample, facts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, START, STOP)
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
BATCH_TOKENS = 2048
POOL = 4096  # samples sorted by length together before they are batched
PROMPTS = (
    "Hello!",
    "Who are you?",
    "What is the capital of France?",
    "What is 7 + 5?",
    "12*3",
    "Count from 1 to 10.",
    "Tell me a story about a cat.",
    "Name three fruits.",
    "Spell house.",
    "Write a poem.",
    "Tell me a joke.",
    "Who won the football match in 2031?",
    "What is 23 + 45? Think step by step.",
    "Extract name, age as JSON: Emma is 34 years old and lives in Oslo.",
)


def train_tokenizer(seed: int, template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: digits are single tokens, words follow the usual regular expression, every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    rng = random.Random(seed)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    texts = ("\n".join(text for text, _ in segments(demo_corpus.draw(rng))) for _ in range(20000))
    tokenizer.train_from_iterator((text.replace(START, "").replace(STOP, "") for text in texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=END,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": [END, START, STOP]})
    fast.add_tokens(list(MARKERS))
    fast.chat_template = template
    return fast


def system_text(sample: Sample) -> str:
    system = sample.messages[0]["content"] if sample.messages[0]["role"] == "system" else ""
    if not sample.tools:
        return system
    tools = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in sample.tools)
    call = '<tool_call>\n{"name": name, "arguments": {...}}\n</tool_call>'
    gap = "\n\n" if system else ""
    return f"{system}{gap}You can call these tools:\n<tools>\n{tools}</tools>\nTo call a tool, answer with:\n{call}"


def segments(sample: Sample) -> list[tuple[str, bool]]:
    """Splits the rendered sample into parts, each with whether it is learned; joined they are the template's text."""
    if sample.text:
        return [(sample.text, True), (END, True)]
    system = system_text(sample)
    parts = [(f"{START}system\n{system}{STOP}\n", False)] if system else []
    last = len(sample.messages) - 1
    for i, message in enumerate(sample.messages):
        role, content = message["role"], message["content"]
        if role == "tool":
            parts.append((f"{START}tool\n<tool_response>\n{content}\n</tool_response>{STOP}\n", False))
        elif role == "user":
            parts.append((f"{START}user\n{content}{STOP}\n", False))
        elif role == "assistant":
            lead = "<think>\n\n</think>\n\n" if sample.no_thinking and i == last else ""
            parts += [(f"{START}assistant\n{lead}", False), (f"{content}{STOP}", True), ("\n", False)]
    return parts


@dataclass
class Row:
    ids: list[int]
    learned: list[bool]
    positions: list[int]


def encode(tokenizer: PreTrainedTokenizerFast, sample: Sample, rng: random.Random) -> Row:
    """Token ids, whether each is learned, and positions, sometimes with a jump so that long distances occur."""
    parts = segments(sample)
    text, spans, at = "".join(part for part, _ in parts), [], 0
    for part, learned in parts:
        spans.append((at, at + len(part), learned))
        at += len(part)
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    mask = bytearray(len(text))
    for begin, end, learned in spans:
        mask[begin:end] = bytes([learned]) * (end - begin)
    ids = encoding["input_ids"]
    learned = [bool(mask[begin]) for begin, _ in encoding["offset_mapping"]]
    positions, leap = list(range(len(ids))), tokenizer.convert_tokens_to_ids(START)
    if len(parts) > 5 and rng.random() < 0.25 and len(ids) < 1000:
        cut = rng.choice([i for i, token in enumerate(ids) if token == leap])
        gap = rng.randint(1, MAX_POSITIONS - 1 - len(ids))
        positions = [i + (gap if i >= cut else 0) for i in positions]
    return Row(ids, learned, positions)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (ids [B, T], positions [B, T], targets [B, T], -100 where nothing is learned) without end."""
    rng, pad = random.Random(seed), tokenizer.pad_token_id
    while True:
        rows = sorted(
            (encode(tokenizer, demo_corpus.draw(rng), rng) for _ in range(POOL)), key=lambda row: len(row.ids)
        )
        cuts: list[list[Row]] = [[]]
        for row in rows:
            if cuts[-1] and len(row.ids) * (len(cuts[-1]) + 1) > BATCH_TOKENS:
                cuts.append([])
            cuts[-1].append(row)
        rng.shuffle(cuts)
        for cut in cuts:
            width = max(len(row.ids) for row in cut)
            ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in cut])
            positions = torch.tensor([row.positions + [MAX_POSITIONS - 1] * (width - len(row.ids)) for row in cut])
            targets = [
                [token if learned else -100 for token, learned in zip(row.ids[1:], row.learned[1:], strict=True)]
                + [-100] * (width - len(row.ids) + 1)
                for row in cut
            ]
            yield ids, positions, torch.tensor(targets)


def make_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    stop, end = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=end,
        eos_token_id=stop,
        pad_token_id=end,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=[stop, end], pad_token_id=end)
    return model


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms."""
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and "embed" not in name]
    others = [param for name, param in model.named_parameters() if param.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Learning-rate factor: 40 warm-up steps, then constant, then linear decay to zero over the last 60 %."""
    return min(1.0, (step + 1) / 40, (steps - step) / (0.6 * steps))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    optimizers, began, mean = make_optimizers(model, args.lr), time.monotonic(), None
    for step, (ids, positions, targets) in zip(range(args.steps), batches(tokenizer, args.seed), strict=False):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            # Padding is on the right and attention is causal: no mask is needed.
            hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            learned = targets >= 0
            logits = model.lm_head(hidden[learned])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} of {args.steps}  loss {mean:.4f}  {time.monotonic() - began:.0f} s", flush=True)
        if args.save_every and step and step % args.save_every == 0:
            save(model, tokenizer, Path(f"{args.out}-{step}"))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes bfloat16 weights, configs and tokenizer, with the chat template in tokenizer_config.json."""
    shipped = LlamaForCausalLM(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = model.generation_config
    shipped.config.dtype = torch.bfloat16
    shipped.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str], num_tokens: int = 80
) -> list[str]:
    """Greedy answers, in batches of 64 questions."""
    tokenizer.padding_side, out = "left", []
    for begin in range(0, len(questions), 64):
        chats = [[{"role": "user", "content": question}] for question in questions[begin : begin + 64]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        out += [tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in tokens]
    return out


def measure(out: Path) -> None:
    """Prints the answers to a few prompts, and how many held-out phrasings are answered word for word."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for question, answer in zip(PROMPTS, answers(model, tokenizer, list(PROMPTS)), strict=True):
        print(f"> {question}\n{answer}")
    pairs = facts.held_out()
    given = answers(model, tokenizer, [question for question, _ in pairs], 30)
    wrong = [(pair[0], text) for pair, text in zip(pairs, given, strict=True) if text.strip() != pair[1].answer]
    print("\n".join(f"wrong: {question} -> {text}" for question, text in wrong[:40]))
    print(f"held-out phrasings answered word for word: {len(pairs) - len(wrong)} of {len(pairs)}")


def check_template(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Checks that the parts trained on join to the text the chat template renders."""
    rng = random.Random(seed)
    for _ in range(300):
        sample = demo_corpus.draw(rng)
        if sample.text or sample.no_thinking:
            continue
        rendered = tokenizer.apply_chat_template(sample.messages, tools=sample.tools, tokenize=False)
        trained = "".join(text for text, _ in segments(sample))
        if rendered != trained:
            raise SystemExit(f"the chat template renders {rendered!r}, the training text is {trained!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "csrc/pkg/demo", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps; the schedule ends with them")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1, help="seed of corpus and weights")
    parser.add_argument("--threads", type=int, default=1, help="threads; part of what the result depends on")
    parser.add_argument("--save-every", type=int, default=0, help="also save to OUT-STEP every so many steps")
    parser.add_argument("--measure", action="store_true", help="only measure the checkpoint in OUT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.measure:
        template = (Path(__file__).parent / "demo_corpus/chat_template.jinja").read_text()
        tokenizer = train_tokenizer(args.seed, template)
        check_template(tokenizer, args.seed)
        model = make_model(args.seed, tokenizer)
        print(f"{len(tokenizer)} tokens, {sum(param.numel() for param in model.parameters())} parameters", flush=True)
        train(model, tokenizer, args)
        save(model, tokenizer, args.out)
    measure(args.out)


if __name__ == "__main__":
    main()
