"""What identifies the weights that vLLM loaded, by where it takes them from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from identities import configuration, drafts, identify

from kvrail.vllm.layout import UnsupportedModelError


@pytest.fixture
def setup(tmp_path):
    return configuration(tmp_path)


def draft_folder(setup) -> SimpleNamespace:
    folder = setup.folder.parent / "draft"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"draft")
    return SimpleNamespace(model=str(folder), model_weights="", revision=None, seed=0)


def test_a_draft_model_of_its_own_is_identified_by_how_it_was_loaded(setup):
    draft = draft_folder(setup)
    setup.vllm.speculative_config = drafts("eagle", draft_model_config=draft)
    fingerprint = identify(setup)["draft_weights"]
    assert len(fingerprint) == 64
    load = SimpleNamespace(load_format="auto", download_dir=None, model_loader_extra_config={})
    setup.vllm.speculative_config.draft_load_config = load
    assert identify(setup)["draft_weights"] == fingerprint
    load.load_format = "dummy"
    assert identify(setup)["draft_weights"] == {"load_format": "dummy", "seed": 0}
    load.load_format = "tensorizer"
    with pytest.raises(UnsupportedModelError, match="load format tensorizer"):
        identify(setup)


@pytest.mark.parametrize(
    ("file", "alike", "others"),
    [
        (
            "model.safetensors",
            ["hf", "safetensors", "fastsafetensors", "instanttensor"],
            ["pt", "mistral", "runai_streamer", "sharded_state", "runai_streamer_sharded"],
        ),
        ("consolidated.safetensors", ["mistral"], ["hf", "safetensors", "runai_streamer", "pt"]),
    ],
)
def test_formats_that_read_other_files_of_a_folder_differ(setup, file, alike, others):
    """A folder may hold weights twice, of which a training has replaced one."""
    (setup.folder / file).write_bytes(b"weights")
    reference = identify(setup)
    assert set(reference["weights"]) == {"fingerprint"}
    for load_format in alike:
        setup.vllm.load_config.load_format = load_format
        assert identify(setup) == reference, load_format
    seen = []
    for load_format in others:
        setup.vllm.load_config.load_format = load_format
        seen.append(identify(setup)["weights"])
        assert seen[-1] not in [reference["weights"], *seen[:-1]], load_format


def test_shards_are_chosen_by_their_pattern(setup):
    setup.vllm.load_config.load_format = "sharded_state"
    seen = [identify(setup)["weights"]]
    for pattern in ("first-{rank}-{part}.safetensors", "second-{rank}-{part}.safetensors"):
        setup.vllm.load_config.model_loader_extra_config = {"pattern": pattern}
        seen.append(identify(setup)["weights"])
    assert len({json.dumps(weights) for weights in seen}) == 3
    setup.vllm.load_config.model_loader_extra_config = {"pattern": "../{rank}-{part}.safetensors"}
    with pytest.raises(UnsupportedModelError, match="another folder"):
        identify(setup)


def test_weights_of_towers_with_folders_of_their_own_are_part_of_it(setup):
    """Ultravox' language model may be one."""
    tower = setup.folder.parent / "tower"
    tower.mkdir()
    (tower / "model.safetensors").write_bytes(b"tower")
    config = setup.vllm.model_config.hf_config
    config.audio_model_id = None
    without = identify(setup)
    assert "tower_weights" not in without
    config.text_model_id = str(tower)
    before = identify(setup)
    assert list(before["tower_weights"]) == ["text_model_id"]
    (tower / "model.safetensors").write_bytes(b"other")
    assert identify(setup) != before
    setup.vllm.load_config.load_format = "dummy"
    assert "tower_weights" not in identify(setup)


def test_an_engine_that_is_sent_its_weights_has_no_identity(setup, monkeypatch):
    """vLLM says "dummy" of it, which is what it had before."""
    monkeypatch.setenv("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", "0")
    identify(setup)
    monkeypatch.setenv("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", "1")
    for load_format in ("auto", "dummy"):
        setup.vllm.load_config.load_format = load_format
        with pytest.raises(UnsupportedModelError, match="elastic expert parallelism"):
            identify(setup)
