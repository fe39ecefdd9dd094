"""Why a model cannot be captured or loaded: errors of one line, also from those of others' code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MAX_REASON = 300
REASONS = {
    "Constraints violated": "its code depends on the number of tokens",
    "Tensor.item() cannot be called on meta tensors": "its code depends on values that are known only when it runs",
    "data-dependent": "its code depends on values that are known only when it runs",
}
"""Parts of torch.export's messages, in words."""


class CaptureError(Exception):
    """One line: cause and cure."""


class LoadError(Exception):
    """One line: the tensor, the file, cause and cure."""


def one_line(error: BaseException) -> str:
    """The error's own words, or its type before them where they alone say little."""
    text = " ".join(str(error).split())
    known = next((words for part, words in REASONS.items() if part in text), "")
    if known:
        return known
    return f"{type(error).__name__} {text}".strip() if len(text.split()) < 3 else text[:MAX_REASON]


@contextmanager
def told_as(kind: type[CaptureError | LoadError], what_failed: str) -> Iterator[None]:
    """Raises errors of others' code inside as `kind`, in one line that begins with `what_failed`."""
    try:
        yield
    except (CaptureError, LoadError):
        raise
    except Exception as error:
        raise kind(f"{what_failed} ({one_line(error)}); this version of fuseline does not support it") from error
