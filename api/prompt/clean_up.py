"""Blanks before punctuation that a tokenizer drops from its text (clean_up_tokenization_spaces), whole or streamed."""

from __future__ import annotations

REPLACED = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve",
    " 're": "'re",
}  # fmt: skip
"""Text -> what stands for it, one after the other (clean_up_tokenization of Transformers)."""


def clean_up(text: str) -> str:
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


class CleanUp:
    """The same for text that comes in pieces; holds back what may become one of these texts."""

    def __init__(self) -> None:
        self._held = [""] * len(REPLACED)

    def feed(self, text: str) -> str:
        for k, (old, new) in enumerate(REPLACED.items()):
            *done, last = (self._held[k] + text).split(old)
            begun = next(n for n in range(min(len(old) - 1, len(last)), -1, -1) if last.endswith(old[:n]))
            self._held[k] = last[len(last) - begun :]
            text = new.join([*done, last[: len(last) - begun]])
        return text

    def finish(self) -> str:
        """Return the text that was held, once no more can come."""
        text = ""
        for k, (old, new) in enumerate(REPLACED.items()):
            text = (self._held[k] + text).replace(old, new)
            self._held[k] = ""
        return text
