"""The cache against plain concatenation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.samplers.autoregressive.cache import StaticCache


def numbers(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def test_updates_are_the_concatenation() -> None:
    cache = StaticCache(2, 3, 2, 6, 4)
    parts = [numbers(3, 2, n, 4) + 100 * n for n in (1, 3, 2)]
    for layer in (0, 1):
        start = 0
        for part in parts:
            k, v = cache.update(layer, part + layer, -part, start)
            start += part.shape[2]
        assert torch.equal(k, torch.cat(parts, 2) + layer)
        assert torch.equal(v, -torch.cat(parts, 2))


def test_what_is_returned_is_the_storage_itself() -> None:
    cache = StaticCache(1, 4, 1, 5, 2)
    k, _ = cache.rows(slice(1, 3)).update(0, numbers(2, 1, 2, 2), numbers(2, 1, 2, 2), 1)
    assert k.data_ptr() == cache.store[0, 0, 1].data_ptr()
    assert not cache.store[:, :, [0, 3]].any()


def test_scattered_rows_write_to_their_places() -> None:
    cache, new = StaticCache(1, 4, 2, 5, 3), numbers(2, 2, 2, 3)
    k, v = cache.rows(torch.tensor([3, 1])).update(0, new, 2 * new, 0)
    assert torch.equal(k, new)
    assert torch.equal(v, 2 * new)
    assert torch.equal(cache.store[0, 0, [3, 1], :, :2], new)
    assert not cache.store[:, :, [0, 2]].any()


def test_rows_of_different_length() -> None:
    cache, new = StaticCache(1, 2, 1, 6, 2), numbers(2, 1, 2, 2)
    k, _ = cache.update(0, new, new, torch.tensor([0, 3]))
    assert k.shape == (2, 1, 5, 2)
    assert torch.equal(k[0, :, :2], new[0])
    assert torch.equal(k[1, :, 3:], new[1])
    assert not k[0, :, 2:].any()
    assert not k[1, :, :3].any()


def test_keep_moves_the_accepted_nodes() -> None:
    cache, new = StaticCache(2, 2, 1, 8, 2), numbers(2, 1, 7, 2)
    for layer in (0, 1):
        cache.update(layer, new, -new, 0)
    cache.keep(torch.tensor([[0, 2, 4], [1, 3, -1]]), 2)
    for layer in (0, 1):
        k, v = cache.store[:, layer]
        assert torch.equal(k[0, :, :5], new[0][:, [0, 1, 2, 4, 6]])
        assert torch.equal(v[1, :, :4], -new[1][:, [0, 1, 3, 5]])
    ragged = StaticCache(1, 2, 1, 8, 2)
    ragged.update(0, new, new, 0)
    ragged.keep(torch.tensor([[1], [2]]), torch.tensor([0, 4]))
    assert torch.equal(ragged.store[0, 0, 0, :, 0], new[0, :, 1])
    assert torch.equal(ragged.store[0, 0, 1, :, 4], new[1, :, 6])


def test_a_grown_cache_keeps_its_rows() -> None:
    cache, new = StaticCache(1, 1, 1, 3, 2), numbers(1, 1, 3, 2)
    cache.update(0, new, new, 0)
    grown = cache.grown(3)
    assert torch.equal(grown.store[:, :, :1], cache.store)
    assert not grown.store[:, :, 1:].any()


def test_no_room_is_an_error() -> None:
    cache, new = StaticCache(1, 1, 1, 3, 2), numbers(1, 1, 2, 2)
    with pytest.raises(ValueError, match="length=3 of the cache is too short for 4 positions"):
        cache.update(0, new, new, 2)


def test_gradients_are_not_stored() -> None:
    cache, new = StaticCache(1, 1, 1, 4, 2), numbers(1, 1, 2, 2).requires_grad_()
    k, _ = cache.update(0, new, new, 0)
    assert not k.requires_grad
