"""What a worker's weights in memory are told apart by."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.parameter import SharedWeightParameter

from kvrail.vllm.loaded_weights import ROW_WORDS, LoadedWeights, digest_models

ROW_BYTES = ROW_WORDS * 8


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Model(nn.Module):
    """Weights of all shapes that kernels like to have them in."""

    def __init__(self) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(3)
        floats = torch.rand((70, 300), generator=make)
        self.matrix = parameter(floats.clone())
        self.transposed = parameter(floats.to(torch.bfloat16).t())
        self.slice = parameter(floats[:, 7:77])
        self.fp8 = parameter(floats.to(torch.float8_e4m3fn))
        self.packed = parameter((floats * 255).to(torch.uint8)[3:])
        self.scalar = parameter(torch.tensor(0.5))
        self.empty = parameter(torch.empty(0, 4))
        self.expanded = parameter(torch.ones(1).expand(5000))


NAMES = [name for name, _ in Model().named_parameters() if name != "empty"]


def test_the_same_weights_give_the_same_digest():
    assert digest_models([Model()]) == digest_models([Model()])
    assert len(digest_models([Model()])) == 64


@pytest.mark.parametrize("name", NAMES)
def test_any_change_of_one_bit_is_seen(name):
    """Of each parameter's first, last and some byte between, wherever it lies."""
    reference = digest_models([Model()])
    model = Model()
    weight = getattr(model, name)
    data = weight.untyped_storage()
    used = torch.zeros(len(data), dtype=torch.bool)
    offsets = torch.arange(len(data) // weight.element_size())
    of_weight = offsets.as_strided(weight.size(), weight.stride(), weight.storage_offset())
    for byte in range(weight.element_size()):
        used[of_weight.flatten() * weight.element_size() + byte] = True
    places = used.nonzero().flatten().tolist()
    for place in {places[0], places[-1], places[len(places) // 2], places[len(places) // 3]}:
        data[place] ^= 0x10
        assert digest_models([model]) != reference, f"{name}, byte {place}"
        data[place] ^= 0x10
    assert digest_models([model]) == reference


def test_bytes_that_nothing_uses_are_not_part_of_it():
    model = Model()
    reference = digest_models([model])
    model.slice.untyped_storage()[0] ^= 0xFF
    assert digest_models([model]) == reference


@pytest.mark.parametrize("distance", [8, ROW_BYTES, ROW_BYTES + 8])
def test_words_that_change_places_are_seen(distance):
    """In a row, in a column, and neither: experts that are dealt out anew, for one."""
    model = nn.Module()
    model.weight = parameter(torch.arange(4 * ROW_BYTES // 8))
    reference = digest_models([model])
    words = model.weight.data
    other = distance // 8
    words[0], words[other] = words[other].clone(), words[0].clone()
    assert digest_models([model]) != reference


def test_names_types_and_shapes_are_part_of_it():
    seen = set()
    for name, tensor in [
        ("a", torch.zeros(4, 2)),
        ("b", torch.zeros(4, 2)),
        ("a", torch.zeros(2, 4)),
        ("a", torch.zeros(4, 2, dtype=torch.int32)),
    ]:
        model = nn.Module()
        model.register_parameter(name, parameter(tensor))
        seen.add(digest_models([model]))
    model = nn.Module()
    model.a = parameter(torch.zeros(4, 2))
    seen.add(digest_models([model, model]))
    assert len(seen) == 5


def test_what_classes_of_their_own_hold_inside_is_seen(monkeypatch):
    """vLLM's parameters that share one memory; the digest follows vLLM's list of them."""
    for name, value in (("world_size", 1), ("rank", 0)):
        target = f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}"
        monkeypatch.setattr(target, lambda value=value: value)
    shared = SharedWeightParameter(weight_loader=lambda *_: None)
    model = nn.Module()
    model.weight = shared
    reference = digest_models([model])
    shared.partitions[0] = parameter(torch.ones(8))
    assert digest_models([model]) != reference


class Attention(nn.Module):
    """A layer with vLLM's scales of the KV cache, and memory that kernels scribble on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(torch.ones(4))
        set_default_quant_scales(self, register_buffer=True)
        self.register_buffer("scratch", torch.zeros(4))


@pytest.mark.parametrize("name", ["_k_scale", "_v_scale", "_q_scale", "_prob_scale"])
def test_scales_of_the_kv_cache_are_part_of_it(name):
    """They are buffers: a checkpoint's are copied to them, and the parameters are dropped."""
    model = nn.Sequential(Attention(), Attention())
    reference = digest_models([model])
    getattr(model[1], name).fill_(0.5)
    changed = digest_models([model])
    assert changed != reference
    getattr(model[0], name).fill_(0.5)
    getattr(model[1], name).fill_(1.0)
    assert digest_models([model]) not in (reference, changed), "which layer's it is"


def test_other_buffers_are_not_part_of_it():
    model = nn.Sequential(Attention())
    reference = digest_models([model])
    model[0].scratch.fill_(7.0)
    assert digest_models([model]) == reference


def test_a_report_says_whether_the_weights_are_as_loaded():
    model = Model()
    weights = LoadedWeights(lambda: [model])
    first = weights.report()
    assert first.is_as_loaded and first.problem is None
    model.matrix[5, 5] += 1.0
    second = weights.report()
    assert not second.is_as_loaded and second.digest != first.digest
    model.matrix.copy_(Model().matrix)
    assert weights.report() == first


def test_without_a_model_there_is_a_reason_and_no_digest():
    # No worker of vLLM is on this stack.
    report = LoadedWeights.of_maker().report()
    assert (report.digest, report.is_as_loaded) == ("", False)
    assert "no model was found" in str(report.problem)


def test_a_model_that_cannot_be_read_is_a_reason_and_no_error():
    def models() -> list[nn.Module]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    report = LoadedWeights(models).report()
    assert "illegal memory access" in str(report.problem)
