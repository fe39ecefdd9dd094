"""Keys of a sequence's full blocks: a SHA-256 chain over everything a block's KV depends on.

They are computed here from tokens and embeddings, never taken from a client, so that equal keys mean equal content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Seq

import numpy as np

from fuseline.engine.messages import PromptEmbeds


def root_key(salt: str, variant: int, owner: str = "") -> bytes:
    """Start of a chain.

    Requests with different salts never share blocks; `variant` is the rope table in use; `owner` confines the chain to
    one request (its n choices share the prompt even when prefix caching is off).
    """
    digest = hashlib.sha256()
    for part in (salt.encode(), str(variant).encode(), owner.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


class EmbedsDigest:
    """Digests of the embeddings in a prompt, which the keys of the blocks that they reach into depend on."""

    def __init__(self, embeds: Seq[PromptEmbeds]) -> None:
        self._parts = [(e.start, e.start + e.count, hashlib.sha256(e.data).digest()) for e in embeds]

    def of_block(self, begin: int, end: int) -> bytes:
        """Digest of the embeddings at positions `begin` to `end`; empty without any."""
        parts = [
            start.to_bytes(8, "little", signed=True) + digest
            for start, stop, digest in ((start - begin, stop, digest) for start, stop, digest in self._parts)
            if start + begin < end and stop > begin
        ]
        return b"".join(parts)


def extend_keys(
    keys: list[bytes],
    root: bytes,
    tokens: array[int] | np.ndarray,
    block_size: int,
    num_blocks: int,
    embeds: EmbedsDigest | None = None,
) -> None:
    """Grow `keys` in place to the keys of the first `num_blocks` full blocks of `tokens` (32 bit each)."""
    for index in range(len(keys), num_blocks):
        begin, end = index * block_size, (index + 1) * block_size
        content = (keys[-1] if keys else root) + tokens[begin:end].tobytes()
        if embeds is not None:
            content += embeds.of_block(begin, end)
        keys.append(hashlib.sha256(content).digest())
