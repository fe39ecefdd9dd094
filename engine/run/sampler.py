"""Arguments of the sampling kernels, gathered from the rows of a step's sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuseline.engine.params import SamplingParams
from fuseline.engine.run.grammar.masks import GrammarMasks
from fuseline.engine.run.histories import Histories, History
from fuseline.engine.run.row_edits import RowEdit
from fuseline.engine.run.sampling import LOGPROBS_MODES, SampleArguments, is_raw
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch


@dataclass(frozen=True)
class RowSettings:
    """Arguments that stay while the same R positions sample."""

    rows: np.ndarray  # [R] int64
    generation: np.ndarray  # [R] int64
    num_top: int
    inputs: dict[str, Tensor]
    """Inputs of the kernel, with lists that are all empty."""
    has_history: np.ndarray  # [R] bool
    has_any_history: bool
    has_lists: bool
    has_edits: bool
    has_grammar: bool
    no_scores: dict[str, Tensor] | None
    """As SampleArguments has it."""


class Sampler:
    def __init__(
        self, rows: RequestRows, vocab_size: int, logprobs_mode: str, histories: Histories | None = None
    ) -> None:
        """`histories`: those of a device that keeps them; without them all tokens are known when a batch is filled."""
        self.rows = rows
        self.histories = histories
        self.masks = GrammarMasks(rows, vocab_size)
        self.vocab_size = vocab_size
        self.mode = LOGPROBS_MODES.index(logprobs_mode)
        self._settings: RowSettings | None = None

    def prepare(self, batch: ScheduledBatch) -> SampleArguments:
        """Arguments as far as they do not depend on the newest tokens."""
        rows, generation, old = batch.rows[batch.sampling], batch.generation[batch.sampling], self._settings
        if old is None or not (np.array_equal(rows, old.rows) and np.array_equal(generation, old.generation)):
            self._settings = old = self._gather(rows, generation)
        counter = torch.from_numpy(batch.lengths - self.rows.prompt_len[rows])
        inputs = {**old.inputs, "counter": counter}
        return SampleArguments(len(rows), old.num_top, self.mode, inputs, no_scores=old.no_scores)

    def fill(self, batch: ScheduledBatch, arguments: SampleArguments, sources: np.ndarray | None) -> None:
        """The rest, for the batch prepared last. sources [R] int64: row of the step before whose token is the newest of
        this one's and not known yet, or -1; None when all are known."""
        settings = self._settings
        if settings.has_lists:
            arguments.inputs |= self._lists(batch)
        if settings.has_edits:
            arguments.edits = self._edits(batch)
        if settings.has_grammar:
            arguments.inputs["bitmask"] = self.masks.of_batch(batch)
        if not settings.has_any_history:
            return
        if self.histories is None:
            arguments.inputs |= self._history(batch)
        else:
            sources = np.full(len(settings.rows), -1) if sources is None else sources
            arguments.history, arguments.inputs["history_start"] = self._kept_history(batch, sources)

    def _gather(self, rows: np.ndarray, generation: np.ndarray) -> RowSettings:
        state = self.rows
        num_logprobs = np.minimum(state.num_logprobs[rows], self.vocab_size)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition", "frequency", "presence", "seed", "prompt_len")
        inputs = {name: torch.from_numpy(getattr(state, name)[rows]) for name in names}
        inputs |= {"num_logprobs": torch.from_numpy(num_logprobs), "bias_values": torch.empty(0)}
        starts, none = torch.zeros(len(rows) + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        inputs |= {"history_start": starts, "history": none}
        for name in ("bias", "banned", "allowed"):
            inputs |= {f"{name}_start": starts, f"{name}_ids": none}
        has_history = state.has_history[rows]
        return RowSettings(
            rows=rows,
            generation=generation,
            num_top=max(0, int(num_logprobs.max(initial=0))),
            inputs=inputs,
            has_history=has_history,
            has_any_history=bool(has_history.any()),
            has_lists=bool(state.has_lists[rows].any()),
            has_edits=bool(state.has_edits[rows].any()),
            has_grammar=bool(state.has_grammar[rows].any()),
            no_scores={} if (num_logprobs < 0).all() else None,
        )

    def _history(self, batch: ScheduledBatch) -> dict[str, Tensor]:
        """Tokens of the rows with penalties, one after the other; other rows have none."""
        lengths = np.where(self._settings.has_history, batch.lengths, 0)
        parts = [self.rows.tokens[row, :length] for row, length in zip(self._settings.rows, lengths, strict=True)]
        start, items = _ragged(parts)
        return {"history_start": start, "history": items}

    def _kept_history(self, batch: ScheduledBatch, sources: np.ndarray) -> tuple[History, Tensor]:
        """And where in it each row's begins and ends, [2, R]."""
        settings = self._settings
        has = settings.has_history
        history, begins = self.histories.extend(
            settings.rows[has], settings.generation[has], batch.lengths[has], sources[has]
        )
        spans = np.zeros((2, len(has)), np.int64)
        spans[:, has] = begins, begins + batch.lengths[has]
        return history, torch.from_numpy(spans)

    def _edits(self, batch: ScheduledBatch) -> list[RowEdit]:
        edits = []
        for index, (row, length) in enumerate(zip(self._settings.rows.tolist(), batch.lengths.tolist(), strict=True)):
            seq = self.rows.sequences[row]
            if self.rows.has_edits[row]:
                generated = self.rows.tokens[row, seq.prompt_len : length].tolist() if seq.processors else ()
                edits.append(RowEdit(
                    index, seq.params.scores_temperature, seq.processors, seq.request.prompt_token_ids, generated,
                    seq.params.logprobs is not None and is_raw(self.mode), seq.params.logprob_token_ids,
                ))  # fmt: skip
        return edits

    def _lists(self, batch: ScheduledBatch) -> dict[str, Tensor]:
        bias: list[list[int]] = []
        values: list[float] = []
        banned: list[list[int]] = []
        allowed: list[list[int]] = []
        for row, length in zip(self._settings.rows.tolist(), batch.lengths.tolist(), strict=True):
            params, num_prompt = self.rows.sequences[row].params, int(self.rows.prompt_len[row])
            bias.append([token for token, _ in params.logit_bias])
            values += [value for _, value in params.logit_bias]
            generated = self.rows.tokens[row, num_prompt:length]
            banned.append([token for token in banned_tokens(params, generated) if 0 <= token < self.vocab_size])
            allowed.append(list(params.allowed_token_ids))
        found: dict[str, Tensor] = {"bias_values": torch.tensor(values, dtype=torch.float32)}
        for name, parts in (("bias", bias), ("banned", banned), ("allowed", allowed)):
            found[f"{name}_start"], found[f"{name}_ids"] = _ragged(parts)
        return found


def _ragged(parts: list) -> tuple[Tensor, Tensor]:
    """Row starts [R + 1] and the items of R rows one after the other, int64. There is a row at least."""
    starts = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return torch.from_numpy(starts), torch.from_numpy(np.concatenate(parts).astype(np.int64))


def banned_tokens(params: SamplingParams, generated: np.ndarray) -> list[int]:
    """Tokens that may not come next: the last of bad words, and those that end a sequence too early.

    The newest generated token need not be known unless a bad word has several tokens.
    """
    banned = [word[-1] for word in params.bad_words if _ends_with(generated, word[:-1])]
    if len(generated) < params.min_tokens and params.grammar is None:  # a grammar's mask knows them
        banned += [*params.eos_token_ids, *params.masked_eos_token_ids, *params.stop_token_ids]
    return banned


def _ends_with(generated: np.ndarray, beginning: tuple[int, ...]) -> bool:
    """Only generated tokens count as the beginning of a bad word (SPEC 6.3: "the output so far")."""
    count = len(beginning)
    return count == 0 or (len(generated) >= count and tuple(generated[-count:].tolist()) == beginning)
