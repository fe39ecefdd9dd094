"""Random texts of a grammar over the demo model's vocabulary, token by token as the sampler's masks allow."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch

from fuseline.api.config import demo_dir
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tokenizer_files import read_tokenizer
from fuseline.api.prompt.vocabulary import make_vocabulary
from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import Grammar
from fuseline.engine.run.grammar.backends.registry import Backends

CLOSERS = b'"}],'


@cache
def demo_vocabulary() -> Vocabulary:
    tokenizer = TextTokenizer(read_tokenizer(str(demo_dir())))
    made = make_vocabulary(tokenizer, (tokenizer.eos_id,))
    return Vocabulary(tokens=made.tokens, eos_token_ids=made.eos_token_ids, vocab_size=len(made.tokens))


@cache
def backends() -> Backends:
    return Backends(demo_vocabulary())


def compiled(spec: GrammarSpec) -> Grammar:
    return backends().get(spec.backend).compile(spec)


def walk(grammar: Grammar, seed: int, most: int = 300) -> str | None:
    """A text of the grammar; None if it has not ended after `most` tokens."""
    vocabulary, rng = demo_vocabulary(), random.Random(seed)
    tokens, (eos,) = vocabulary.tokens, vocabulary.eos_token_ids
    matcher, found = grammar.matcher((eos,)), b""
    mask = torch.empty((1, -(-len(tokens) // 32)), dtype=torch.int32)
    for _ in range(most):
        mask.fill_(-1)
        matcher.fill_next_token_bitmask(mask)
        allowed = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: len(tokens)].nonzero()[0].tolist()
        assert allowed, found
        if eos in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return found.decode()
        choices = [token for token in allowed if token != eos]
        if rng.random() < 0.6:
            choices = [token for token in choices if tokens[token][:1] in CLOSERS] or choices
        token = rng.choice(choices)
        assert matcher.accept_token(token)
        found += tokens[token]
    return None
