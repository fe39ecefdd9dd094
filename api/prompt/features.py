"""A conversation as prompt text: template, options and their checks (SPEC 5, 11)."""

from __future__ import annotations

from typing import Any

from fuseline.api.config import ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.prompt.chat_template import ChatTemplate, prepare_messages
from fuseline.api.prompt.tokens import TextTokenizer


def render_chat(fields: Any, config: ServerConfig, template: ChatTemplate | None, tokenizer: TextTokenizer) -> str:
    """Prompt text of a request with ChatFields. Raises ApiError 400."""
    if not fields.messages:
        raise bad_request("messages must not be empty", "messages")
    if fields.chat_template is not None:
        raise bad_request(
            "chat_template is not accepted in requests by this server; start it with --chat-template", "chat_template"
        )
    if template is None:
        raise bad_request(
            "the model has no chat template: start the server with --chat-template, or use /v1/completions", "messages"
        )
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise bad_request(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    adds = not continues and fields.add_generation_prompt is not False
    messages = prepare_messages([message.model_dump(exclude_none=True) for message in fields.messages])
    variables = {
        **tokenizer.special_tokens,
        "tools": getattr(fields, "tools", None) if getattr(fields, "tool_choice", None) != "none" else None,
        "documents": getattr(fields, "documents", None),
        "add_generation_prompt": adds,
        **dict(config.default_chat_template_kwargs),
        **(fields.chat_template_kwargs or {}),
    }
    text = template.render(messages, variables)
    return _cut_after_last(text, messages[-1]) if continues else text


def _cut_after_last(text: str, message: dict[str, Any]) -> str:
    """Leaves the last message open: the text up to the end of its content."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise bad_request("continue_final_message needs a last message with text", "continue_final_message")
    found = text.rfind(content.strip())
    if found < 0:
        raise bad_request(
            "continue_final_message: the template changes the last message's text, so it cannot be continued",
            "continue_final_message",
        )
    return text[: found + len(content.strip())]
