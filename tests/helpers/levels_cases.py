"""Prompts and token counts that tests of optimization levels generate from."""

from __future__ import annotations

from zoo import make_prompts

NUM_TOKENS = 24

PROMPTS = make_prompts((3, 9, 20))
