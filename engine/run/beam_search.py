"""The hypotheses of a beam search (SPEC 6.11): which of them go on, from the log-probabilities of their next tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from msgspec.structs import replace

from fuseline.engine.messages import PositionLogprobs
from fuseline.engine.params import SamplingParams


@dataclass(frozen=True)
class Beam:
    """A hypothesis: generated tokens with their log-probabilities."""

    tokens: tuple[int, ...] = ()
    scores: tuple[PositionLogprobs, ...] = ()
    logprob: float = 0.0
    """Cumulative, of an EOS that ended it too."""
    is_done: bool = False
    length: int = 0
    """Tokens generated, a final EOS apart."""
    parent: int = -1
    """Index, among the beams of the step before, of the one that it extends."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A beam and the token of rank `index` behind it."""

    beam: Beam
    parent: int
    step: PositionLogprobs
    index: int
    logprob: float


class BeamSearch:
    """The search of one request: `live` beams of one length, and the best that an EOS has completed."""

    def __init__(self, params: SamplingParams, num_prompt: int, num_steps: int) -> None:
        """`params` with `beams`; n is the width, `logprobs` at least twice that."""
        self._width, self._num_prompt, self._num_steps = params.n, num_prompt, num_steps
        self._eos, self._settings = set(params.eos_token_ids), params.beams
        self._done: list[Beam] = []
        self.live = [Beam()]

    def extend(self, steps: Sequence[PositionLogprobs]) -> bool:
        """Take the next tokens' scores of all live beams. False once no beam needs to go on."""
        pairs = list(enumerate(zip(self.live, steps, strict=True)))
        for parent, (beam, step) in pairs:
            self._done += [self._completed(found) for found in self._candidates(parent, beam, step, are_eos=True)]
        self._done = heapq.nlargest(self._width, self._done, key=self._score)
        # All are of one length, so the likeliest have the best scores; those of a beam come in their order.
        extensions = (self._candidates(parent, beam, step) for parent, (beam, step) in pairs)
        likeliest = heapq.merge(*extensions, key=lambda found: -found.logprob)
        self.live = [_grown(found) for found in islice(likeliest, self._width)]
        return bool(self.live) and self.live[0].length < self._num_steps and not self._is_settled()

    def best(self) -> list[Beam]:
        """The best hypotheses, completed or not."""
        return heapq.nlargest(self._width, self._done + self.live, key=self._score)

    def _candidates(
        self, parent: int, beam: Beam, step: PositionLogprobs, are_eos: bool = False
    ) -> Iterator[_Candidate]:
        """The likeliest extensions of a beam, in descending order, made as they are asked for."""
        for index, token in enumerate(step.top_ids[: 2 * self._width]):
            if (token in self._eos) == are_eos:
                yield _Candidate(beam, parent, step, index, beam.logprob + step.top_logprobs[index])

    def _completed(self, found: _Candidate) -> Beam:
        grown, beam = _grown(found), found.beam
        tokens, scores = (grown.tokens, grown.scores) if self._settings.keeps_eos else (beam.tokens, beam.scores)
        return Beam(tokens, scores, found.logprob, True, beam.length)

    def _score(self, beam: Beam) -> float:
        return self._scaled(beam.logprob, beam.length)

    def _scaled(self, logprob: float, length: int) -> float:
        return logprob / (self._num_prompt + length) ** self._settings.length_penalty

    def _is_settled(self) -> bool:
        """Whether no live beam can come among the best any more: its log-probability only falls."""
        if len(self._done) < self._width:
            return False
        worst = min(map(self._score, self._done))
        length = self._num_steps if self._settings.length_penalty > 0 else self.live[0].length
        return worst > max(self._scaled(beam.logprob, length) for beam in self.live)


def _grown(found: _Candidate) -> Beam:
    beam, step, index = found.beam, found.step, found.index
    token = step.top_ids[index]
    score = replace(step, token_id=token, logprob=step.top_logprobs[index], rank=index + 1)
    return Beam((*beam.tokens, token), (*beam.scores, score), found.logprob, False, beam.length + 1, found.parent)
