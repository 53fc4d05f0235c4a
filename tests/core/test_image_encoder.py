"""The OpenCLIP wrapper, with tiny models that open_clip itself builds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from difflora_core.errors import BadWeightsFile, DiffLoRAError
from difflora_core.image_encoder import (
    ImageEncoder,
    ImageEncoderConfig,
    compact_rows,
    tokenise,
)
from difflora_core.weights_file import read_safetensors, write_safetensors

CONFIG = ImageEncoderConfig(
    {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16,
        },
        "text_cfg": {"width": 16, "heads": 2, "layers": 1},
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    made = ImageEncoder.create(CONFIG)
    table = made.clip.token_embedding.weight
    with torch.no_grad():
        table[1000:] = table[1000]  # as in a world of few words
    made.clip.half().float()
    return made.eval()


def test_shapes_and_gradients(encoder: ImageEncoder) -> None:
    images = torch.rand(2, 3, 40, 56, requires_grad=True)
    embedding, tokens = encoder.encode(images)
    assert embedding.shape == (2, 16) and tokens.shape == (2, 16, 32)
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2), atol=1e-5)
    embedding[:, 0].sum().backward()
    assert images.grad is not None and images.grad[..., 8:48].abs().sum() > 0
    assert images.grad[..., :8].abs().sum() == 0  # outside the middle square


def test_embeddings_are_open_clips_own(encoder: ImageEncoder) -> None:
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(CONFIG.mean).view(3, 1, 1)
    std = torch.tensor(CONFIG.std).view(3, 1, 1)
    expected = encoder.clip.encode_image((images - mean) / std)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = encoder.encode(images)[0]
    assert torch.allclose(found, expected / expected.norm(dim=-1, keepdim=True), atol=1e-6)


def test_saved_and_opened_it_is_the_same_and_small(encoder: ImageEncoder, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    encoder.save(path)
    assert path.stat().st_size < 600_000  # the full token table alone takes 1.6 MB
    opened = ImageEncoder.open(path)
    images, prompts = torch.rand(1, 3, 32, 32), ["a photo of a person", "a cat"]
    for name, value in encoder.clip.state_dict().items():
        assert torch.equal(opened.clip.state_dict()[name], value), name
    assert torch.allclose(opened.encode(images)[0], encoder.encode(images)[0], atol=1e-5)
    assert torch.allclose(opened.encode_text(prompts), encoder.encode_text(prompts), atol=1e-5)
    assert opened.config == encoder.config and opened.image_size == 32


def test_tokens_are_clips() -> None:
    tokens = tokenise(["a photo", ""])
    assert tokens.shape == (2, 77)
    assert tokens[0, :5].tolist() == [49406, 320, 1125, 49407, 0]
    assert tokens[1, :3].tolist() == [49406, 49407, 0]


def test_compact_rows_are_exact() -> None:
    table = torch.randn(50, 4)[torch.randint(5, (50,))]
    rows, index = compact_rows(table)
    assert len(rows) <= 5 and index.dtype == torch.int32
    assert torch.equal(rows[index.long()], table)


def test_refusals(encoder: ImageEncoder, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)}, {})
    with pytest.raises(BadWeightsFile, match=r"e\.safetensors is not an image encoder of ours"):
        ImageEncoder.open(path)
    with pytest.raises(DiffLoRAError, match="open_clip has no model 'ViT-Q-1'"):
        ImageEncoder.open(path, "ViT-Q-1")
    with pytest.raises(BadWeightsFile, match="There is no checkpoint at"):
        ImageEncoder.open(tmp_path / "none.pt", "ViT-B-32")
    (tmp_path / "page.pt").write_text("<html>please log in</html>")
    with pytest.raises(BadWeightsFile, match="holds no plain tensors") as refused:
        ImageEncoder.open(tmp_path / "page.pt", "ViT-B-32")
    assert "weights_only" not in str(refused.value)
    (tmp_path / "page.safetensors").write_text("<html>please log in</html>")
    with pytest.raises(BadWeightsFile, match="is a web page"):
        ImageEncoder.open(tmp_path / "page.safetensors", "ViT-B-32")
    encoder.save(path, overwrite=True)
    tensors, metadata = read_safetensors(path)
    tensors.pop("visual.proj")
    write_safetensors(path, tensors, metadata, overwrite=True)
    with pytest.raises(BadWeightsFile, match="does not fit the config in its header"):
        ImageEncoder.open(path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"space": {}}, "Unknown key image_encoder.space"),
        ({"model": {}}, "missing 3 required positional arguments: 'embed_dim'"),
        ({"model": {**CONFIG.model, "text_cfg": "none"}}, "'str' object has no attribute"),
        ({"model": CONFIG.model, "mean": [0.5]}, "shape '[3, 1, 1]' is invalid for input of size"),
        ({"model": {**CONFIG.model, "embed_dim": -1}}, "negative"),
    ],
)
def test_another_file_is_named(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    path = tmp_path / "other.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)}, {"config": json.dumps(config)})
    with pytest.raises(BadWeightsFile) as refused:
        ImageEncoder.open(path)
    message = refused.value.message
    assert message.startswith("other.safetensors is not an image encoder of ours: ")
    assert reason in message and "OpenCLIP" in refused.value.hint


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (None, "does not fit the config"),
        (torch.tensor([9**9] * 49408), "index 387420489 is out of"),
    ],
)
def test_words_without_their_rows(
    encoder: ImageEncoder, tmp_path: Path, index: torch.Tensor | None, sentence: str
) -> None:
    path = tmp_path / "e.safetensors"
    encoder.save(path)
    tensors, metadata = read_safetensors(path)
    del tensors["token_index"]
    tensors |= {} if index is None else {"token_index": index}
    write_safetensors(path, tensors, metadata, overwrite=True)
    with pytest.raises(BadWeightsFile, match=rf"e\.safetensors .*{sentence}"):
        ImageEncoder.open(path)


def test_missing_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(DiffLoRAError, match="pip install open_clip_torch"):
        ImageEncoder.create(CONFIG)
