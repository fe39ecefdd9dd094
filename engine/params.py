"""Parameters of a request, validated and resolved by the API, as typed msgspec structs."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec


class LogitsProcessor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A callable by its dotted name, or a factory of one with its arguments."""

    qualname: str
    is_factory: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The language that generated text must be in, as a grammar that is yet to be compiled."""

    kind: Literal["ebnf", "lark", "structural_tag", "regex", "json_schema"]
    """ebnf: GBNF with a rule `root`; lark: with a rule `start`; structural_tag: xgrammar's JSON. Other backends take
    regex and json_schema, an object with `schema` and `whitespace`, the regex between JSON's tokens."""
    text: str
    backend: str = "xgrammar"
    starts_after: tuple[int, ...] = ()
    """Token ids that follow each other in the answer before the grammar begins: the end of thinking. Until then every
    token but an ending one may come. Empty: from the first token on."""

    spelled: tuple[tuple[int, str], ...] = ()
    """Special tokens that the grammar reads as their text: the marks of a format."""
    is_slow: bool = False
    """Its masks may take long: no step waits for them."""
    is_free: bool = False
    """Text may end wherever the grammar has no more to say of it, and may hold special tokens there; the request's
    other settings say when it ends."""

    @property
    def key(self) -> bytes:
        """SHA-256 of what is compiled."""
        marks = (f"{token} {text}" for token, text in self.spelled)
        parts = (self.backend, self.kind, str(self.is_free), self.text, *marks)
        return hashlib.sha256(b"".join(len(p.encode()).to_bytes(8, "little") + p.encode() for p in parts)).digest()


class BeamParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of a beam search, whose width is n."""

    length_penalty: float = 1.0
    keeps_eos: bool = False
    """An EOS that completes a hypothesis is among its tokens."""
    num_shown: int | None = None
    """As `logprobs` of other requests: how many alternatives are told; None = no log-probabilities."""


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bounds the tokens of reasoning, which is the text between marks at the begin of an answer."""

    num_tokens: int
    """Tokens behind the first mark; then the end is forced."""
    begins: tuple[str, ...]
    ends: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    """Tokens of the end that is forced."""
    is_open: bool = False
    """The answer begins within reasoning."""
    may_resume: bool = False
    """Reasoning may begin again behind its end; the budget is for all of it."""
    spelled: tuple[tuple[int, str], ...] = ()
    """Special tokens that are part of marks, and their text."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sampling"):
    """One request's sampling settings, validated and resolved by the API (SPEC 4.1, 6)."""

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    """0 = off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None = unseeded. Choice i of n uses seed + i."""
    max_tokens: int = 16
    """Already capped by the context; 0 only scores the prompt."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence; also what min_tokens masks. Empty when ignore_eos."""
    masked_eos_token_ids: tuple[int, ...] = ()
    """EOS ids that min_tokens masks even under ignore_eos."""
    logprobs: int | None = None
    """None = none wanted; k = the sampled token's and the k best; the API turns -1 (all) into the vocabulary's size."""
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    """Empty = all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprob_token_ids: tuple[int, ...] = ()
    """With logprobs: the alternatives shown at each position, in place of the best ones."""
    logits_processors: tuple[LogitsProcessor, ...] = ()
    scores_temperature: float = 1.0
    """Temperature at which log-probabilities are taken; for beam search, whose steps are greedy."""
    grammar: GrammarSpec | None = None
    beams: BeamParams | None = None
    """Search for the n likeliest texts, with temperature 0 and `logprobs` of at least 2 n. All choices are told at the
    end, best first; before, one output of choice 0 tells of the prompt."""
    thinking: ThinkingBudget | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the tokens so far say which may come next."""
        return self.grammar is not None or self.thinking is not None

    @property
    def is_structured(self) -> bool:
        """Whether a grammar alone says where the text ends."""
        return self.grammar is not None and not self.grammar.is_free

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the sequence. A grammar allows EOS only where it is complete, and then ignore_eos is void."""
        eos = self.masked_eos_token_ids if self.is_structured else ()
        return tuple(dict.fromkeys((*self.eos_token_ids, *self.stop_token_ids, *eos)))


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="pooling"):
    """How a request's one vector is made: from its last token, or as the mean over all its tokens."""

    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    """Divide the vector by its Euclidean length."""

    @property
    def n(self) -> int:
        return 1
