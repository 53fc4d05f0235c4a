"""The same LoRA means the same weights in diffusers and PEFT, both ways."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from difflora_core.__main__ import main
from difflora_core.header import LoraHeader
from difflora_core.key_names import module_table
from difflora_core.lora import Lora
from difflora_core.weights_file import lora_to_kohya, open_lora, read_lora, write_lora
from tests.core.lora_samples import attention_lora, random_lora

HEADER = LoraHeader(title="x", base="mini")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).eval()


@pytest.fixture
def pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512
    )
    return StableDiffusionPipeline(
        vae=None,  # type: ignore[arg-type]
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=None,  # type: ignore[arg-type]
        unet=unet,
        scheduler=None,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Weights of all Linear and Conv layers by canonical name."""
    found = {}
    for component in ("unet", "text_encoder"):
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                path = name if component == "unet" else f"text_model.{name}"
                found[f"{component}.{path.replace('text_model.text_model', 'text_model')}"] = (
                    module.weight.detach().clone()
                )
    return found


def fused_differences(pipe: StableDiffusionPipeline, file: Path) -> dict[str, Tensor]:
    """What diffusers adds to each weight when it loads and fuses a file."""
    before = weights(pipe)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = weights(pipe)
    return {name: after[name] - before[name] for name in before}


def agree(lora: Lora, differences: dict[str, Tensor]) -> None:
    changed = {name for name, difference in differences.items() if bool(difference.any())}
    assert changed == set(lora.layers)
    for layer in lora:
        torch.testing.assert_close(differences[layer.name], layer.delta(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.4, -0.5])
def test_diffusers_adds_our_deltas(
    pipeline: StableDiffusionPipeline, tmp_path: Path, scale: float
) -> None:
    lora = attention_lora("mini", scale=scale)
    write_lora(lora, tmp_path / "a.safetensors", HEADER, dtype=torch.float32)
    agree(lora, fused_differences(pipeline, tmp_path / "a.safetensors"))


def test_diffusers_adds_our_deltas_to_text_encoder_and_convolutions(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    names = [
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.up_blocks.0.upsamplers.0.conv",
        "unet.mid_block.attentions.0.proj_in",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        # diffusers 0.42 beside transformers 5 drops the attention layers of the text encoder, and
        # says so in a warning of transformers; the other ones arrive.
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.text_model.encoder.layers.2.mlp.fc2",
    ]
    lora = random_lora("mini", names)
    write_lora(lora, tmp_path / "a.safetensors", HEADER, dtype=torch.float32)
    agree(lora, fused_differences(pipeline, tmp_path / "a.safetensors"))


def test_peft_computes_the_same_picture(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Unfused, through PEFT's own forward, against weights with the deltas added by hand."""
    lora = attention_lora("mini")
    write_lora(lora, tmp_path / "a.safetensors", HEADER, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 77, 128, generator=generator)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    with torch.no_grad():
        theirs = pipeline.unet(x, 500, text).sample
        pipeline.unload_lora_weights()
        for layer in lora:
            module = pipeline.unet.get_submodule(layer.name.removeprefix("unet."))
            module.weight += layer.delta()
        ours = pipeline.unet(x, 500, text).sample
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def _trained(unet: UNet2DConditionModel, config: LoraConfig) -> dict[str, Tensor]:
    """Add an adapter with random factors; returns the difference that PEFT would merge."""
    unet.add_adapter(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return {
        f"unet.{name}": module.get_delta_weight("default").detach()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves_is_read_with_its_alpha(
    unet: UNet2DConditionModel, tmp_path: Path, rslora: bool
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=[*ATTENTION, "proj_in"],
        alpha_pattern={"attn2.to_k": 16},
        rank_pattern={"attn2.to_k": 8},
    )
    expected = _trained(unet, config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    agree(read_lora(tmp_path / "pytorch_lora_weights.safetensors"), expected)


def test_the_older_spelling_of_diffusers_is_read(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    expected = _trained(unet, LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
    )
    reading = open_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert reading.layout == "diffusers"
    agree(reading.lora, expected)


def test_what_peft_saves_is_read_with_its_alpha(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=ATTENTION, init_lora_weights=False, use_rslora=True
    )
    model = get_peft_model(unet, config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    expected = {
        f"unet.{name.removeprefix('base_model.model.')}": module.get_delta_weight(
            "default"
        ).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    reading = open_lora(tmp_path / "adapter_model.safetensors")
    assert reading.layout == "PEFT"
    agree(reading.lora, expected)


def test_diffusers_maps_every_sdxl_key_that_we_write() -> None:
    """The sgm names that kohya writes for SDXL, through diffusers' own conversion."""
    table = module_table("sdxl")
    attention = set(attention_lora("sdxl", rank=1).layers)
    conv = {n for n in table.shapes if n.startswith("unet.") and ".resnets.0.conv" in n}
    lora = random_lora("sdxl", [n for n in table.shapes if n in attention | conv], rank=1)
    with torch.device("meta"):
        config = UNet2DConditionModel(
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ).config
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        lora_to_kohya(lora), unet_config=config
    )
    modules = {re.sub(r"_lora\.(down|up)\.weight|\.lora\.(down|up)\.weight", "", k) for k in state}
    mapped = {m.replace(".processor.", ".").replace(".to_out", ".to_out.0") for m in modules}
    assert mapped == set(lora.layers)
    assert len(alphas) == len(lora)


@pytest.mark.parametrize("rank", [None, 2])
def test_copies_of_what_diffusers_saves_load_in_diffusers(
    pipeline: StableDiffusionPipeline, tmp_path: Path, rank: int | None
) -> None:
    """Its header tells of ranks and alphas, which it refuses beside those of kohya's keys."""
    unet = copy.deepcopy(pipeline.unet)
    _trained(unet, LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    source, file = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "a.safetensors"
    if rank is None:
        lora = read_lora(source)
        write_lora(lora, file, lora.metadata, dtype=torch.float32)
    else:
        words = ["resize", str(source), "--rank", str(rank), "--out", str(file)]
        assert main(words) == 0
        lora = read_lora(file)
    agree(lora, fused_differences(pipeline, file))
