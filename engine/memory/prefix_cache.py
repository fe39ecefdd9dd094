"""Keys of cached blocks: a SHA-256 chain over everything a block's keys and values depend on.

They are computed here from tokens alone, never taken from a client, so that equal keys mean equal content.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np


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


def extend_keys(
    keys: list[bytes], root: bytes, tokens: array[int] | np.ndarray, block_size: int, num_blocks: int
) -> None:
    """Grow `keys` in place to the keys of the first `num_blocks` full blocks of `tokens` (32 bit each)."""
    for index in range(len(keys), num_blocks):
        parent = keys[-1] if keys else root
        content = tokens[index * block_size : (index + 1) * block_size].tobytes()
        keys.append(hashlib.sha256(parent + content).digest())
