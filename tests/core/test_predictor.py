from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from difflora_core.autoencoder.tokens import LayerHeads
from difflora_core.config import to_dict
from difflora_core.errors import BadConfig, BadWeightsFile, LayoutMismatch
from difflora_core.lora import Lora
from difflora_core.predictor import Predictor, central
from difflora_core.weights_file import read_safetensors, write_safetensors

from .predictors import FACE, IMAGE, SPACE, tiny_config, tiny_features, tiny_predictor

PRESETS = ("default", "paper")


def equal(first: Lora, second: Lora) -> bool:
    return all(
        torch.equal(x.up, y.up) and torch.equal(x.down, y.down)
        for x, y in zip(first, second, strict=True)
    )


def rows(count: int):
    on = torch.ones(count, dtype=torch.bool)
    return torch.randn(count, FACE), torch.randn(count, IMAGE), on, on


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_and_gradients_reach_every_parameter(preset):
    p = tiny_predictor(preset).train()
    vectors = torch.randn(3, SPACE.size)
    z = p.encode(vectors)
    assert z.shape == (3, *p.latent_shape)
    half = torch.tensor([True, False, True])
    face, image, _, on = rows(3)
    c = p.condition(face, image, half, ~half | on)
    x0 = p.denoise(torch.randn_like(z), torch.tensor([0.1, 0.5, 1.0]), c)
    made = p.decode(x0)
    assert made.shape == vectors.shape and made.dtype == torch.float32
    null = p.denoise(z, torch.ones(3), p.no_condition(3))
    (made.square().sum() + p.decode(z).square().sum() + null.square().sum()).backward()
    assert [n for n, x in p.named_parameters() if x.grad is None] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_bf16_autocast_stays_close(preset):
    p = tiny_predictor(preset)
    inputs, z, t = rows(2), torch.randn(2, *p.latent_shape), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        exact = p.decode(p.denoise(z, t, p.condition(*inputs)))
        with torch.autocast("cpu", torch.bfloat16):
            rough = p.decode(p.denoise(z, t, p.condition(*inputs)))
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("preset", PRESETS)
def test_training_path_compiles_without_graph_breaks(preset):
    p = tiny_predictor(preset)

    def ups(face, image, on, z, t):
        vectors = p.decode(p.denoise(z, t, p.condition(face, image, on, on)))
        return SPACE.unpack_ups(vectors)

    inputs = (*rows(2)[:3], torch.randn(2, *p.latent_shape), torch.rand(2))
    compiled = torch.compile(ups, backend="eager", fullgraph=True)(*inputs)
    for name, up in ups(*inputs).items():
        torch.testing.assert_close(compiled[name], up)


@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_predictor_gives_the_average_lora(preset):
    p = Predictor(tiny_config(preset)).eval()
    p.value_statistics.fit(torch.randn(20, SPACE.size))
    predicted = p.predict(tiny_features(), seed=1).lora
    assert equal(predicted, p.average())


def test_statistics_standardise_and_survive_constant_slots():
    p = tiny_predictor()
    samples = torch.randn(50, SPACE.size) * 3 + 1
    samples[:, 0] = 4.0
    p.value_statistics.fit(samples)
    standard = p.value_statistics(samples)
    torch.testing.assert_close(standard.mean(0), torch.zeros(SPACE.size), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard[:, 1:].std(0, correction=0), torch.ones(SPACE.size - 1))
    torch.testing.assert_close(p.value_statistics.inverse(standard), samples)
    assert bool(standard.isfinite().all())


@pytest.mark.parametrize("preset", PRESETS)
def test_same_seed_same_tensors_whatever_the_candidate_count(preset):
    p, features = tiny_predictor(preset), tiny_features(2)
    one, again = (p.predict(features, seed=5, steps=4) for _ in range(2))
    assert equal(one.lora, again.lora)
    many = p.predict(features, seed=5, steps=4, candidates=3)
    for x, y in zip(many.candidates[0], one.lora, strict=True):
        torch.testing.assert_close(x.up, y.up, rtol=1e-5, atol=1e-5)
    assert not equal(p.predict(features, seed=6, steps=4).lora, one.lora)
    assert not equal(p.predict(tiny_features(seed=1), seed=5, steps=4).lora, one.lora)


def test_options_change_what_they_name():
    p, features = tiny_predictor(), tiny_features()
    plain = p.predict(features, seed=1)
    assert plain.report["steps"] == 4 and plain.report["spread"] == 0
    twice = p.predict(features, seed=1, strength=2.0)
    for x, y in zip(twice.lora, plain.lora, strict=True):
        torch.testing.assert_close(x.delta(), 2 * y.delta())
    assert not equal(p.predict(features, seed=1, guidance=2.0).lora, plain.lora)
    torch.testing.assert_close(
        p.predict(features, seed=1, guidance=1.00001).lora.layers[SPACE.layers[0].name].up,
        plain.lora.layers[SPACE.layers[0].name].up,
        rtol=1e-3,
        atol=1e-4,
    )
    many = p.predict(features, seed=1, candidates=5, steps=2)
    assert len(many.candidates) == 5 and many.report["spread"] > 0
    assert many.lora is many.candidates[many.report["chosen"]]
    assert json.loads(json.dumps(many.report)) == many.report


@pytest.mark.parametrize("gauge", ["frozen_down", "shared_init", "svd", "free"])
def test_strength_multiplies_the_difference_whatever_is_predicted(gauge):
    p, features = tiny_predictor(space=dataclasses.replace(SPACE, gauge=gauge)), tiny_features()
    plain, other = (p.predict(features, seed=1, strength=s) for s in (1.0, -1.5))
    for x, y in zip(other.lora, plain.lora, strict=True):
        torch.testing.assert_close(x.delta(), -1.5 * y.delta())
    assert other.report["spread"] == pytest.approx(plain.report["spread"])


def test_missing_face_or_image_is_taken_as_missing():
    p, features = tiny_predictor(), tiny_features()
    both = p.predict(features, seed=1).lora
    only_face = p.predict(features.without_image(), seed=1).lora
    only_image = p.predict(features.without_face(), seed=1).lora
    assert not equal(both, only_face) and not equal(only_face, only_image)
    c = p.condition(
        *rows(2)[:2], torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    )
    null = p.no_condition(1)
    torch.testing.assert_close(c.vector[0], null.vector[0])


def test_gates_are_shares_and_start_equal():
    mixer = Predictor(tiny_config()).mixer
    f, i = torch.randn(2, 3, 16)
    assert torch.equal(mixer.gates(f, i), torch.ones(3, 2, 16))
    gates = tiny_predictor().mixer.gates(f, i)
    torch.testing.assert_close(gates.sum(1), torch.full((3, 16), 2.0))
    assert not torch.equal(gates[0], gates[1])


def test_central_candidate_is_the_one_nearest_to_the_mean():
    vectors = torch.tensor([[0.0, 4.0], [1.0, 1.0], [2.0, -2.0]])
    assert central(vectors)[0] == 1


def test_bundle_round_trip_is_exact(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tiny_predictor().save(first)
    opened = Predictor.open(first)
    opened.save(second)
    before, after = read_safetensors(first), read_safetensors(second)
    assert before[1] == after[1]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0] | after[0])
    assert before[0]["value_statistics.mean"].dtype == torch.float32
    assert opened.config == tiny_predictor().config and len(opened.file_hash) == 64
    prediction = opened.predict(tiny_features(), seed=3)
    assert equal(prediction.lora, Predictor.open(first).predict(tiny_features(), seed=3).lora)
    assert prediction.report["predictor_hash"] == opened.file_hash
    with pytest.raises(BadWeightsFile, match="exists"):
        opened.save(first)


def test_damaged_bundles_are_refused_with_counts(tmp_path):
    path, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    p = tiny_predictor()
    p.save(path)
    tensors, header = read_safetensors(path)
    removed = tensors.pop("dit.position")
    write_safetensors(broken, {**tensors, "extra": removed}, header)
    with pytest.raises(BadWeightsFile, match=r"1 missing \(dit.position\); 1 unexpected \(extra\)"):
        Predictor.open(broken)
    write_safetensors(broken, {**tensors, "dit.position": removed[:1]}, header, overwrite=True)
    with pytest.raises(BadWeightsFile, match=r"1 of another shape \(dit.position\)"):
        Predictor.open(broken)
    write_safetensors(broken, tensors, {}, overwrite=True)
    with pytest.raises(BadWeightsFile, match="not a DiffLoRA predictor"):
        Predictor.open(broken)
    config = to_dict(p.config)
    config["dit"]["widht"] = config["dit"].pop("width")
    changed = {**header, "config": json.dumps(config)}
    write_safetensors(broken, tensors, changed, overwrite=True)
    with pytest.raises(BadWeightsFile, match=r"b\.safet.* Unknown key dit.widht.* later, version"):
        Predictor.open(broken)
    config = to_dict(p.config)
    config["mixer"]["width"] = 0
    changed = {**header, "config": json.dumps(config)}
    write_safetensors(broken, tensors, changed, overwrite=True)
    with pytest.raises(BadWeightsFile, match=r"b\.safetensors is not a predictor that this"):
        Predictor.open(broken)
    config = to_dict(p.config)
    config["space"]["base"] = "sd9"
    changed = {**header, "config": json.dumps(config)}
    write_safetensors(broken, tensors, changed, overwrite=True)
    with pytest.raises(BadWeightsFile, match=r"its base model is 'sd9'.* later, version"):
        Predictor.open(broken)


def test_wrong_input_is_refused():
    p, features = tiny_predictor(), tiny_features()
    with pytest.raises(BadConfig, match="steps must be 1 to 50, found 0"):
        p.predict(features, seed=0, steps=0)
    with pytest.raises(BadConfig, match="candidates must be 1 to 64, found 65"):
        p.predict(features, seed=0, candidates=65)
    with pytest.raises(BadConfig, match="strength must be -100 to 100, not nan"):
        p.predict(features, seed=0, strength=float("nan"))
    with pytest.raises(LayoutMismatch, match="face embeddings of 24 numbers, found"):
        p.predict(dataclasses.replace(features, face=torch.randn(1, 512)), seed=0)
    with pytest.raises(LayoutMismatch, match="comes from other; the predictor knows pack"):
        p.predict(dataclasses.replace(features, face_encoder="other"), seed=0)
    with torch.no_grad():
        p.value_statistics.mean[0] = float("nan")
    with pytest.raises(BadWeightsFile, match="not finite"):
        p.predict(features, seed=0)


def test_progress_and_interruption():
    p, seen = tiny_predictor(), []
    p.predict(tiny_features(), seed=0, steps=2, progress=lambda *x: seen.append(x))
    assert seen == [(1, 2), (2, 2)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        p.predict(tiny_features(), seed=0, progress=stop)
    assert equal(
        p.predict(tiny_features(), seed=0).lora,
        tiny_predictor().predict(tiny_features(), seed=0).lora,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_few_steps_of_training_overfit(preset):
    """Autoencoder and denoiser learn two LoRAs by heart and tell them apart by their photos."""
    torch.manual_seed(0)
    p = tiny_predictor(preset).train()
    vectors, c_in = torch.randn(2, SPACE.size), rows(2)
    p.value_statistics.fit(vectors)
    p.value_statistics.std.fill_(1.0)
    optimiser = torch.optim.AdamW(p.parameters(), lr=1e-2)
    t = torch.ones(2)
    for _ in range(150):
        z = torch.randn(2, *p.latent_shape)
        loss = (p.decode(p.denoise(z, t, p.condition(*c_in))) - vectors).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3 * float(vectors.var())


def test_layers_start_at_their_principal_directions() -> None:
    torch.manual_seed(0)
    heads = LayerHeads([6, 4], basis=2)
    heads.initialise()
    first, second = torch.randn(50, 2) @ torch.randn(2, 6), torch.randn(50, 2) @ torch.randn(2, 4)
    values = torch.cat([first, second], dim=1)
    assert not torch.allclose(heads.expand(heads.compress(values)), values, atol=0.1)
    heads.fit(values)
    assert torch.allclose(heads.expand(heads.compress(values)), values, atol=1e-4)


def test_fewer_loras_than_directions_leave_some_as_they_were() -> None:
    heads = LayerHeads([6], basis=3)
    heads.initialise()
    before = heads.directions["6"].clone()
    values = torch.randn(2, 6)
    heads.fit(values)
    found = heads.directions["6"][0]
    assert torch.equal(found[:, 2], before[0, :, 2])
    assert torch.allclose(values @ found[:, :2] @ found[:, :2].mT, values, atol=1e-5)
