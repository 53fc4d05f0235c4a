"""Header fields: what must be there, what is left out, how bases are recognised."""

from __future__ import annotations

import json

import pytest

from difflora_core.header import (
    LoraHeader,
    base_named_in,
    json_field,
    network_fields,
    of_a_copy,
    without_weight_facts,
)
from difflora_core.key_names import BASES

MUST = {"sai_model_spec", "architecture", "implementation", "title"}


@pytest.mark.parametrize("base", BASES)
def test_what_the_standard_demands_is_there(base: str) -> None:
    fields = LoraHeader(title="x", base=base).to_dict()
    assert {f"modelspec.{name}" for name in MUST} <= set(fields)
    assert all(isinstance(value, str) and value for value in fields.values())
    assert base_named_in(fields) == base
    assert base_named_in({"ss_base_model_version": fields["ss_base_model_version"]}) == base


def test_facts_that_are_not_known_are_left_out() -> None:
    fields = LoraHeader(title="x").to_dict()
    assert set(fields) == {"modelspec.sai_model_spec", "modelspec.title", "difflora.version"}
    assert LoraHeader(title="x", seed=0, strength=0.0).to_dict()["difflora.seed"] == "0"
    merged = LoraHeader(title="x", merged_from=("a", "b")).to_dict()
    assert merged["modelspec.merged_from"] == "a, b"


@pytest.mark.parametrize(
    ("version", "base"),
    [
        ("sd_v1", "sd15"),
        ("sd_1.5", "sd15"),
        ("sd_v2_v", "sd21"),
        ("sd_2.1", "sd21"),
        ("sdxl_base_v1-0", "sdxl"),
        ("sdxl_1.0", "sdxl"),
        ("sdxl_", "sdxl"),
        ("flux.1", None),
        ("", None),
    ],
)
def test_bases_as_other_trainers_name_them(version: str, base: str | None) -> None:
    assert base_named_in({"ss_base_model_version": version}) == base


def test_ranks_that_differ_are_dynamic() -> None:
    assert network_fields([4, 4], [2.0, 2.0])["ss_network_dim"] == "4"
    assert network_fields([4, 4], [2.0, 2.0000001])["ss_network_alpha"] == "2"
    assert network_fields([4, 8], [2.0, 4.0])["ss_network_alpha"] == "Dynamic"


def test_json_fields_tolerate_anything() -> None:
    assert json_field({"a": '{"b": 1}'}, "a") == {"b": 1}
    assert json_field({"a": "{"}, "a") == {}
    assert json_field({"a": "[1]"}, "a") == {}
    assert json_field({}, "a") == {}
    assert json_field({"a": "[" * 100_000}, "a") == {}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://github.com/Stability-AI/generative-models", True),
        ("stable-diffusion-xl-v1-base/lora", True),
        ("sks person, and/or either / or, 2024/05/06", True),
        ('{"sks": {"a photo\\nof": 3}}', True),
        ("data:image/jpeg;base64,/9j/4AAQ", False),
        ('{"concept_path": "/home/jane/photos/jane"}', False),
        ('{"dir": "C:\\\\Users\\\\jane"}', False),
        ("D:/photos", False),
        ("\\\\server\\photos", False),
        ("file:///home/jane", False),
        (json.dumps({"path": "\\\\nas\\photos\\jane"}), False),
        ("//nas/photos/jane/", False),
        ('{"path": "//nas/photos"}', False),
        ("https://example.org//two", True),
    ],
)
def test_paths_and_photos_do_not_travel(text: str, kept: bool) -> None:
    assert of_a_copy({"note": text}) == ({"note": text} if kept else {})


def test_what_is_worked_out_anew_is_not_copied() -> None:
    old = {"ss_network_dim": "32", "sshs_model_hash": "ab", "difflora.certificates": "{}"}
    old |= {"lora_adapter_metadata": "{}"}
    assert of_a_copy(old) == {"difflora.certificates": "{}"}
    assert without_weight_facts(old) == {}
