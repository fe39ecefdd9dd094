"""Why a model cannot be captured or loaded, in words."""


class CaptureError(Exception):
    """One line: cause and cure."""


class LoadError(Exception):
    """One line: the tensor, the file, cause and cure."""
