"""The answers of /tokenize and /detokenize (SPEC 16), which need no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from fuseline.api.errors import bad_request
from fuseline.api.prompt.chat import ChatRenderer
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.limits import check_ids
from fuseline.api.prompt.prepared import Written
from fuseline.api.protocol.chat import DetokenizeRequest, TokenizeRequest

PIECE_BYTES = 64 * 1024


def tokenize(body: TokenizeRequest, tokenizer: TextTokenizer, renderer: ChatRenderer, context: int) -> Written:
    """Raises ApiError 400."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.prompt is not None:
        ids = tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    else:
        rendered = renderer.render(body)
        ids = tokenizer.encode_chat(rendered.text, rendered.literals, bool(body.add_special_tokens))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": context, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_name(token) for token in ids]
    return _written(answer)


def detokenize(need_tokenizer: Callable[[], TextTokenizer], vocab_size: int, body: DetokenizeRequest) -> Written:
    """`vocab_size`: the model's, which can be above the tokenizer's. Raises ApiError 400."""
    tokenizer = need_tokenizer()
    check_ids(body.tokens, max(tokenizer.vocab_size, vocab_size), "tokens")
    return _written({"prompt": tokenizer.decode(body.tokens, False)})


def _written(answer: dict[str, Any]) -> Written:
    data = msgspec.json.encode(answer)
    return Written([data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)])
