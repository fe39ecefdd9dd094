"""The files of a checkpoint that stay as they are when its weights are written anew."""

from __future__ import annotations

import shutil
from pathlib import Path

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors", "*.onnx", "*.h5", "*.msgpack", "*.index.json",
    ".*",
)  # fmt: skip
"""Files that are not copied."""
TEMPLATES = "additional_chat_templates"


def copy_others(source: Path, target: Path) -> None:
    """Copies settings, tokenizer, code and chat templates from one directory to another. Raises OSError."""
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
            shutil.copyfile(path, target / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)
