"""Beam search in the engine: the beams of a request are sequences that wait for each other after every token.

A beam that goes on in one way keeps its sequence. Further ways are forked from it: they share its full blocks and get
a copy of the one that is partly filled. Where there is no row or block for a fork, or the beams of a group have not
been computed in one step, sequences are queued anew and find what they share in the prefix cache.
"""

from __future__ import annotations

from msgspec.structs import replace

from fuseline.engine.messages import PositionLogprobs, TokenOutput
from fuseline.engine.requests import Requests
from fuseline.engine.run.beam_search import Beam, BeamSearch
from fuseline.engine.schedule.scheduler import Scheduler
from fuseline.engine.state.sequence import Sequence, forked


class BeamGroup:
    """The beams of one request. `members` are the sequences of `search.live`, in its order."""

    def __init__(self, seq: Sequence, num_steps: int) -> None:
        self.search = BeamSearch(seq.params, seq.prompt_len, num_steps)
        self.members = [seq]
        self.scores: dict[Sequence, PositionLogprobs] = {}
        """Of the next tokens, of those that have been computed."""


class Beams:
    """The groups of one engine. `can_fork`: blocks can be copied."""

    def __init__(self, requests: Requests, scheduler: Scheduler, max_model_len: int, can_fork: bool) -> None:
        self._requests, self._scheduler = requests, scheduler
        self._max_model_len, self._can_fork = max_model_len, can_fork
        self._touched: dict[BeamGroup, None] = {}

    def take(self, seq: Sequence, scores: PositionLogprobs) -> None:
        """The scores of a beam's next tokens."""
        if seq.group is None:
            seq.group = BeamGroup(seq, min(seq.params.max_tokens, self._max_model_len - seq.prompt_len))
        seq.group.scores[seq] = scores
        self._touched[seq.group] = None

    def advance(self) -> None:
        """After all tokens of a step: groups with all of their scores go on."""
        touched, self._touched = self._touched, {}
        for group in touched:
            if any(seq.is_finished for seq in group.members):
                continue
            if len(group.scores) < len(group.members):
                self._park(group)
            else:
                self._extend(group)

    def _park(self, group: BeamGroup) -> None:
        """Beams that wait for others hold no memory, which those may need."""
        for seq in group.scores:
            self._scheduler.remove(seq)

    def _extend(self, group: BeamGroup) -> None:
        if not group.search.live[0].length:
            self._tell_first(group.members[0])
        goes_on = group.search.extend([group.scores[seq] for seq in group.members])
        group.scores = {}
        if not goes_on:
            return self._finish(group)
        parents, group.members = group.members, []
        heirs: dict[int, Beam] = {}
        for beam in group.search.live:
            heirs.setdefault(beam.parent, beam)
        kept = {index for index, beam in heirs.items() if self._set_token(parents[index], beam)}
        for beam in group.search.live:
            parent = parents[beam.parent]
            if beam.parent in kept and heirs[beam.parent] is beam:
                group.members.append(parent)
            else:
                group.members.append(self._fork(group, parent, beam, beam.parent in kept))
        for index, seq in enumerate(parents):
            if index not in kept:
                self._requests.retire(seq)

    def _set_token(self, seq: Sequence, beam: Beam) -> bool:
        """Let a running sequence go on with the beam's last token, in place of the one that was sampled."""
        length = seq.prompt_len + beam.length
        if seq.row < 0 or seq.rows.num_known[seq.row] != length or seq.rows.num_tokens[seq.row] != length:
            return False
        seq.rows.tokens[seq.row, length - 1] = beam.tokens[-1]
        return True

    def _fork(self, group: BeamGroup, parent: Sequence, beam: Beam, can_share: bool) -> Sequence:
        child = forked(parent, beam.tokens, self._requests.new_handle())
        child.group = group
        self._requests.live[child.request.request_id].append(child)
        if not (can_share and self._can_fork and self._scheduler.fork(parent, child)):
            self._scheduler.add(child)
        return child

    def _tell_first(self, seq: Sequence) -> None:
        """What is told with a request's first token."""
        scores = None
        if seq.prompt_scores is not None:
            scores, seq.prompt_scores = seq.prompt_scores.message(), None
            if seq.row >= 0:
                seq.rows.wants_scores[seq.row] = False
        output = TokenOutput(
            request_id=seq.request.request_id, prompt_logprobs=scores, num_cached_tokens=seq.num_cached,
            queue_seconds=seq.queue_seconds,
        )  # fmt: skip
        self._requests.report.outputs.append(output)

    def _finish(self, group: BeamGroup) -> None:
        seq = group.members[0]
        num_shown = seq.params.beams.num_shown
        outputs = [
            TokenOutput(
                request_id=seq.request.request_id, index=index, token_ids=beam.tokens,
                logprobs=() if num_shown is None else tuple(_cut(score, num_shown) for score in beam.scores),
                finish_reason="stop" if beam.is_done else "length", times=seq.times,
            )  # fmt: skip
            for index, beam in enumerate(group.search.best())
        ]
        for member in group.members:
            self._requests.retire(member)
        self._requests.report.outputs += outputs


def _cut(score: PositionLogprobs, count: int) -> PositionLogprobs:
    return replace(score, top_ids=score.top_ids[:count], top_logprobs=score.top_logprobs[:count])
