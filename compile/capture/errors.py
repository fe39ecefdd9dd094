"""Why a model cannot be captured, in words."""


class CaptureError(Exception):
    """One line: cause and cure."""
