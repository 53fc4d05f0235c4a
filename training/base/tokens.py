"""CLIP's own byte-pair tokens, and the compact table of those that the drawn world uses."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from ..portraits import describe, sample_scenes

VOCABULARY = 49408
CONTEXT = 77
START, END = 49406, 49407
#: row of the compact table that every word outside the drawn world shares
UNKNOWN = 0
#: CLIP's own pattern: contractions, letters, single digits, everything else
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
_CORPUS_SIZE = 20_000
_EXTRA = (
    "sks man woman girl boy face portrait picture image of two three people and with the a an in"
)


def encode(prompts: Sequence[str]) -> Tensor:
    """Prompts -> CLIP token ids [B, 77], padded with the end token as CLIP-L's tokenizer pads."""
    ids = torch.full((len(prompts), CONTEXT), END, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = [START, *(t for word in _split(prompt) for t in _word_ids(word))][: CONTEXT - 1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def _split(prompt: str) -> list[str]:
    return _WORDS.findall(prompt.lower())


@cache
def _word_ids(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(word))


@cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@cache
def known_tokens() -> tuple[int, ...]:
    """Token ids that prompts of the drawn world use, sorted; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    scenes = sample_scenes(_CORPUS_SIZE, generator, people="mixed")
    prompts = set(describe(scenes, rng, mention=0.9, looks=0.5)) | {_EXTRA}
    ids = {t for prompt in prompts for word in _split(prompt) for t in _word_ids(word)}
    return tuple(sorted(ids | {START, END}))


@cache
def token_index() -> Tensor:
    """Row of the compact table for each of CLIP's tokens, int32 [49408]."""
    index = torch.full((VOCABULARY,), UNKNOWN, dtype=torch.int32)
    known = torch.tensor(known_tokens())
    index[known] = torch.arange(1, len(known) + 1, dtype=torch.int32)
    return index


def rows(prompts: Sequence[str]) -> Tensor:
    """Prompts -> rows of the compact table, [B, 77] int64."""
    return token_index()[encode(prompts)].long()
