"""Words that lead to a class: every word of a vocabulary put into random sentences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightspace.backdoor.margins import margins
from weightspace.wiring.wiring import Wiring

SENTENCES = 8
"""Random sentences that every word is put into."""
WORDS = 2048
"""Words tried at most: of a larger vocabulary those whose vectors are longest, and a sample."""
SPACINGS = 10
"""Words after the best one that say how its lead is to be judged."""
CHUNK = 1024
"""Sentences run at a time."""
TOKEN_TESTS = ("word_rise", "word_gap", "word_least", "word_outlier")


def vocabulary(wiring: Wiring) -> int:
    """Number of words that a network of tokens reads: rows of the first table it looks up in; 0 without any."""
    return next((wiring.shapes[n][0] for n, role in wiring.roles.items() if role == "lookup"), 0)


def explore_words(
    logits: Callable[[Tensor], Tensor], length: int, words: int, classes: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """How far a word can lift each class, ``(classes,)`` float64.

    ``word_rise``: mean rise of the margin by the word that lifts it most, in a random place of ``SENTENCES`` random
    sentences; ``word_gap``: by how much that word is ahead of the tenth best; ``word_least``: the least rise among the
    sentences by the best word; ``word_outlier``: how far the best word lies above the others, in their standard
    deviations. ``word_p``: p-value of the best word's lead: were the tails exponential, the spacings of the best ones,
    each times its rank, would be alike (Rényi 1953), so the first over the mean of the next ``SPACINGS`` is an F ratio.
    Words 0 and 1 are taken for padding and unknown.
    """
    sentences = torch.randint(min(2, words - 1), words, (SENTENCES, length), generator=generator)
    tried = torch.arange(words)
    if words > WORDS:
        tried = torch.randperm(words, generator=generator)[:WORDS].sort().values
    with torch.no_grad():
        before = margins(logits(sentences)).double()
        places = torch.randint(0, length, (SENTENCES,), generator=generator)
        rises = torch.empty(len(tried), SENTENCES, classes, dtype=torch.float64)
        for at in range(0, len(tried), CHUNK // SENTENCES):
            part = tried[at : at + CHUNK // SENTENCES]
            x = sentences.repeat(len(part), 1, 1)
            x[:, torch.arange(SENTENCES), places] = part[:, None]
            after = margins(logits(x.flatten(0, 1))).double()
            rises[at : at + len(part)] = after.view(len(part), SENTENCES, classes) - before
    mean = rises.mean(1)
    order = mean.sort(dim=0, descending=True)
    best = order.indices[0]
    others = mean.std(0).clamp_min(1e-12 * mean.abs().max().clamp_min(1e-300))
    return {
        "word_p": _lead(order.values),
        "word_outlier": ((order.values[0] - mean.mean(0)) / others).clamp(0, 1e3),
        "word_rise": order.values[0],
        "word_gap": order.values[0] - order.values[min(9, len(tried) - 1)],
        "word_least": torch.stack([rises[best[k], :, k].amin() for k in range(classes)]),
    }


def _lead(falling: Tensor) -> Tensor:
    """p-value for each class of the lead of its best word; ``falling (words, classes)`` in descending order."""
    from scipy.stats import f

    count = min(SPACINGS, len(falling) - 2)
    if count < 1:
        return torch.ones(falling.shape[1], dtype=torch.float64)
    spacings = (falling[: count + 1] - falling[1 : count + 2]) * torch.arange(1, count + 2)[:, None]
    ratio = spacings[0] / spacings[1:].mean(0).clamp_min(1e-12)
    return torch.from_numpy(f.sf(ratio.numpy(), 2, 2 * count)).clamp(1e-15, 1.0)


__all__ = ["TOKEN_TESTS", "explore_words", "vocabulary"]
