"""Errors of others' code as one line of words."""

MAX_REASON = 300


def one_line(error: BaseException) -> str:
    """The error's own words, or its type before them where they alone say little."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__} {text}".strip() if len(text.split()) < 3 else text[:MAX_REASON]
