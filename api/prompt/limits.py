"""Which requests are admitted: every bound that a request is held to, cheap ones first (SPEC 4.1, 4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fuseline.api.config import ServerConfig
from fuseline.api.errors import ApiError, bad_request
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.protocol.common import GenerateRequest
from fuseline.engine.messages import EngineReady

MAX_NAMED = 20
"""Token ids that an error lists."""


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 for token ids out of the vocabulary; all of them are named."""
    wrong = list(dict.fromkeys(token for token in ids if not 0 <= token < vocab_size))
    if wrong:
        shown = ", ".join(map(str, wrong[:MAX_NAMED])) + (", ..." if len(wrong) > MAX_NAMED else "")
        words = f"Token id {shown} is" if len(wrong) == 1 else f"Token ids {shown} are"
        message = f"{param}: {words} out of vocabulary, which has {vocab_size} tokens (0 to {vocab_size - 1})"
        raise bad_request(message, param)


class Limits:
    """The bounds of one server; all methods raise ApiError with the field's name."""

    def __init__(self, config: ServerConfig, ready: EngineReady, tokenizer: TextTokenizer | None) -> None:
        self.context = ready.max_model_len
        self.vocab = ready.vocab_size
        self._config = config
        self._tokenizer = tokenizer

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self._config.served_model_name:
            raise ApiError(404, f"The model `{name}` does not exist.", "model", "model_not_found")

    def check_sizes(self, fields: Mapping[str, Any]) -> None:
        """Counts of a body that has been parsed and not been validated: no element is looked at but the first."""
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if isinstance(messages, list) and len(messages) > self._config.max_messages:
            most = self._config.max_messages
            raise bad_request(f"messages: at most {most} messages are allowed (--max-messages)", "messages")
        prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if len(prompts) > self._config.max_num_prompts:
            most = self._config.max_num_prompts
            raise bad_request(f"prompt: at most {most} prompts are allowed (--max-num-prompts)", "prompt")
        if fields.get("truncate_prompt_tokens") is None:
            for ids in prompts:
                self._check_fits(len(ids) if isinstance(ids, list) else 0)
        most = max(n if isinstance(n := fields.get(name), int) else 1 for name in ("n", "best_of"))
        self._check_rules(fields, len(prompts) * most)

    def _check_rules(self, fields: Mapping[str, Any], num_sequences: int) -> None:
        stops = fields.get("stop")
        if isinstance(stops, list) and len(stops) > self._config.max_stop_strings:
            most = self._config.max_stop_strings
            raise bad_request(f"stop: at most {most} stop strings are allowed (--max-stop-strings)", "stop")
        left = self._config.max_token_rules
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids", "bad_words", "logprob_token_ids"):
            rules = fields.get(name)
            left -= num_sequences * len(rules) if isinstance(rules, list | dict) else 0
            if left < 0:
                most = self._config.max_token_rules
                words = f"{name}: at most {most} entries for all prompts and choices are allowed (--max-token-rules)"
                raise bad_request(words, name)

    def check_text(self, text: str, param: str = "prompt") -> None:
        """Refuses a text that must be longer than the context, before it is encoded."""
        fewest = self._tokenizer.fewest_tokens(text) if self._tokenizer and len(text) > self.context else 0
        self._check_fits(fewest, "at least ", param)

    def _check_fits(
        self, num_prompt: int, about: str = "", param: str = "prompt", must_leave_one: bool = False
    ) -> None:
        if num_prompt + must_leave_one > self.context:
            raise bad_request(
                f"This model's maximum context length is {self.context} tokens, but the prompt has "
                f"{about}{num_prompt}. Please shorten the prompt.",
                param, "context_length_exceeded",
            )  # fmt: skip

    def check_prompt(self, ids: Sequence[int], param: str = "prompt") -> None:
        if not ids:
            raise bad_request("Prompt cannot be empty", param)
        if min(ids) < 0 or max(ids) >= self.vocab:
            self.check_ids(ids, param)

    def check_ids(self, ids: Iterable[int], param: str) -> None:
        """Refuses token ids that the model has not."""
        check_ids(ids, self.vocab, param)

    def max_tokens(self, num_prompt: int, asked: int | None, cap: int | None, names: tuple[str, str]) -> int:
        """Tokens that may be generated; `cap` is the server's own. Refuses a prompt and an ask that do not fit.

        `names`: the client's fields of the prompt and of what is asked.
        """
        prompt_name, asked_name = names
        self._check_fits(num_prompt, "", prompt_name, must_leave_one=asked != 0)
        if asked is not None and num_prompt + asked > self.context:
            raise bad_request(
                f"This model's maximum context length is {self.context} tokens. However, you requested "
                f"{num_prompt + asked} tokens ({num_prompt} in the prompt, {asked} in the completion). "
                "Please reduce the length of the prompt or the completion.",
                asked_name, "context_length_exceeded",
            )  # fmt: skip
        limits = [self.context - num_prompt, asked, cap]
        return min(limit for limit in limits if limit is not None)

    def kept(self, num_tokens: int, request: GenerateRequest) -> slice:
        """The tokens that truncate_prompt_tokens keeps, by default the last ones; -1 keeps what fits the context."""
        keep = request.truncate_prompt_tokens
        if keep is None:
            return slice(0, num_tokens)
        if keep == -1:
            keep = self.context
        if keep < 1:
            raise bad_request(
                "truncate_prompt_tokens must be at least 1 (or -1 for the context length)", "truncate_prompt_tokens"
            )
        if keep > self.context:
            raise bad_request(
                f"truncate_prompt_tokens ({keep}) is above the context length ({self.context})",
                "truncate_prompt_tokens",
            )
        if request.truncation_side == "right":
            return slice(0, min(keep, num_tokens))
        return slice(max(num_tokens - keep, 0), num_tokens)

    def check_stops(self, request: GenerateRequest) -> None:
        stops = request.stops
        if any(not stop for stop in stops):
            raise bad_request("stop cannot contain an empty string.", "stop")
        if stops and self._tokenizer is None:
            raise bad_request("stop needs a tokenizer; this server runs without one", "stop")

    def check_priority(self, priority: int | None) -> None:
        if priority and self._config.engine.scheduler.scheduling_policy != "priority":
            raise bad_request(f"Got priority {priority} but Priority scheduling is not enabled.", "priority")
