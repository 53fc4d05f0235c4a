"""Textual Inversion (Gal et al., 2022): a new word for each person, everything else frozen.

All people train at once: each sample of the batch sees its own person's embedding at the place of
the trigger's rare word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.base.noise import NoiseSchedule
from training.base.painter import Painter
from training.base.pool import encode_images
from training.base.tokens import rows

RARE_WORD = "sks"
"""The word whose embedding is learnt."""
START_WORD = "person"
"""The word whose embedding it starts from."""
LR = 5e-3
BATCH_PER_PERSON = 4


@dataclass(frozen=True)
class Words:
    """One learnt embedding per person."""

    embeddings: Tensor
    """[P, width]"""

    @contextmanager
    def using(self, painter: Painter, person: Tensor) -> Iterator[None]:
        """Inside, row i of a batch reads person[i]'s word; further rows repeat from the start."""
        with replaced_word(painter.text, self.embeddings[person.to(self.embeddings.device)]):
            yield


def invert(
    painter: Painter,
    pictures: Tensor,
    prompts: Sequence[Sequence[str]],
    steps: int,
    seed: int,
) -> Words:
    """Learn a word per person by the denoising loss (equation 2 of the paper).

    pictures [P, K, 3, H, W] in 0..1; prompts: K personal prompts for each of P people.
    """
    people, count = pictures.shape[:2]
    device = painter.device
    latents = encode_images(painter.vae, pictures.flatten(0, 1).to(device))
    latents = latents.unflatten(0, (people, count))
    tokens = rows([text for own in prompts for text in own]).to(device)
    tokens = tokens.unflatten(0, (people, count))
    start = _embedding_table(painter.text).weight[_row_of(START_WORD)].detach()
    words = start.repeat(people, 1).requires_grad_(True)
    optimiser = torch.optim.AdamW([words], lr=LR, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(seed)
    schedule = NoiseSchedule(device)
    who = torch.arange(people, device=device).repeat_interleave(BATCH_PER_PERSON)
    for _ in range(steps):
        which = torch.randint(count, who.shape, generator=generator, device=device)
        batch = latents[who, which], tokens[who, which]
        loss = _loss(painter, schedule, words[who], *batch, generator)
        # the mean over people would weaken each person's gradient; Adam is blind to the factor,
        # but not to its epsilon
        optimiser.zero_grad()
        (loss * people).backward()
        optimiser.step()
    return Words(words.detach())


@contextmanager
def replaced_word(text: nn.Module, embeddings: Tensor) -> Iterator[None]:
    """Inside, the rare word of prompt i has embeddings[i % N], [N, width]; differentiable."""
    row = _row_of(RARE_WORD)

    def replace(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        ids = args[0]
        repeats = -(-ids.shape[0] // len(embeddings))
        own = embeddings.repeat(repeats, 1)[: ids.shape[0], None].to(output.dtype)
        return torch.where((ids == row)[..., None], own, output)

    hook = _embedding_table(text).register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _loss(
    painter: Painter,
    schedule: NoiseSchedule,
    words: Tensor,
    latents: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
) -> Tensor:
    device = latents.device
    t = torch.randint(1000, (len(latents),), generator=generator, device=device)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    with replaced_word(painter.text, words):
        context = painter.text(tokens).last_hidden_state
    noisy = schedule.add_noise(latents, noise, t)
    return schedule.loss(painter.unet(noisy, t, context).sample, noise, t).mean()


def _embedding_table(text: nn.Module) -> nn.Embedding:
    tables = [m for n, m in text.named_modules() if n.endswith("token_embedding")]
    assert len(tables) == 1 and isinstance(tables[0], nn.Embedding)
    return tables[0]


def _row_of(word: str) -> int:
    """The row of a one-token word in the compact token table."""
    return int(rows([word])[0, 1])
