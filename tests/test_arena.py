"""The arena: every weight once, every view over the same memory."""

import pytest
import torch

from hyperllama.arena import ALIGNMENT, Arena, arena_bytes
from hyperllama.names import logical_tensors, packed_shapes
from tests.reference import shape

SHAPES = {
    "tied": shape(),
    "untied": shape(tie_embeddings=False),
    "odd sizes": shape(hidden_size=18, head_dim=6, vocab_size=7),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logical_tensors_cover_every_packed_element_exactly_once(config):
    arena = Arena(config, torch.float32, "cpu", training=False)
    for view in arena.logical("weights").values():
        view += 1
    assert all(bool((view == 1).all()) for view in arena.packed("weights").values())
    assert int(arena.weights.sum()) == config.num_parameters == sum(tensor.size for tensor in logical_tensors(config))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logical_tensors_share_memory_with_the_packed_rows_they_name(config):
    arena = Arena(config, torch.float32, "cpu", training=True)
    for role in ("weights", "master", "grad", "m", "v"):
        packed, logical = arena.packed(role), arena.logical(role)
        for tensor in logical_tensors(config):
            view = logical[tensor.name]
            assert view.shape == tensor.shape
            assert view.is_contiguous()
            assert view.data_ptr() == packed[tensor.packed][tensor.start].data_ptr()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_packed_tensors_are_aligned_and_do_not_overlap(config):
    arena = Arena(config, torch.bfloat16, "cpu", training=False)
    end = 0
    for name, (rows, *columns) in packed_shapes(config).items():
        assert arena.offsets[name] % ALIGNMENT == 0
        assert arena.offsets[name] >= end
        end = arena.offsets[name] + rows * (columns[0] if columns else 1)
    assert end <= arena.size


@pytest.mark.parametrize(
    ("dtype", "wide", "shared"),
    [
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, True),
    ],
)
def test_masters_gradients_and_moments_are_wide(dtype, wide, shared):
    arena = Arena(shape(), dtype, "cpu", training=True)
    assert (arena.master.data_ptr() == arena.weights.data_ptr()) == shared
    assert arena.weights.dtype == dtype
    assert {getattr(arena, role).dtype for role in ("master", "grad", "m", "v")} == {wide}
    buffers = {buffer.data_ptr(): buffer for buffer in (arena.weights, arena.master, arena.grad, arena.m, arena.v)}
    assert arena.bytes() == sum(buffer.nbytes for buffer in buffers.values())
    assert arena_bytes(arena.size, dtype, training=False) == arena.weights.nbytes


def test_masters_follow_weights_that_were_written():
    arena = Arena(shape(), torch.bfloat16, "cpu", training=True)
    arena.weights.normal_()
    arena.master_from_weights()
    assert torch.equal(arena.master, arena.weights.float())
