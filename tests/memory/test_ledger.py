"""The ledger's count of storages, on cases whose answer is plain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ltxforge.memory.ledger import DeviceAttention, Ledger

META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, device=META, dtype=dtype)


def test_a_storage_counts_once_from_the_op_that_makes_it_until_nothing_refers_to_it():
    with Ledger("cpu") as ledger:
        first = empty(10, 10)
        view = first.t()[2:]
        assert ledger.live == 400
        second = first + 1
        assert ledger.live == 800
        del first
        assert ledger.live == 800  # the view holds it
        del view
        assert ledger.live == 400
        del second
        assert ledger.live == 0
    assert [stretch.peak for stretch in ledger.stretches] == [800]


def test_what_was_there_before_is_free_and_known_by_being_read():
    before, other = empty(100), empty(100)
    with Ledger("cpu") as ledger:
        result = before.view(10, 10) * 2
        assert ledger.live == result.nbytes
    assert before.untyped_storage()._cdata in ledger.read
    assert other.untyped_storage()._cdata not in ledger.read


def test_stretches_begin_with_what_is_live_and_know_small_storages():
    with Ledger("cpu", least=100) as ledger:
        small, large = empty(4), empty(100)
        ledger.mark("then")
        _ = small + large[:4]
        found = ledger.stretch("then")
    assert (found.began, found.small, found.peak) == (416, 16, 432)


def test_a_gpu_counts_in_pieces_of_512_bytes():
    with Ledger("cuda") as ledger:
        held = [empty(1), empty(129)]
        assert ledger.live == 512 + 1024
    assert len(held) == 2


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_matrix_of_all_pairs(kind, masked):
    """Kept are q, k, v, the result and a number a row; far less than tokens times tokens."""
    heads, tokens, width = 4, 4096, 64
    given = [empty(1, heads, tokens, width, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    mask = empty(1, 1, 1, tokens, dtype=torch.bfloat16) if masked else None
    with Ledger(kind) as ledger, DeviceAttention(kind):
        result = functional.scaled_dot_product_attention(*given, attn_mask=mask)
        numbers = heads * tokens
        assert ledger.live == pytest.approx(numbers * (2 * width + 4), rel=0.01)
        assert result.shape == given[0].shape and result.requires_grad


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_rms_norm_of_a_gpu_is_one_op(kind):
    x, weight = empty(64, 128, dtype=torch.bfloat16).requires_grad_(), empty(128, dtype=torch.bfloat16)
    with Ledger(kind) as ledger, DeviceAttention(kind):
        y = functional.rms_norm(x, (128,), weight, 1e-6)
        kept = ledger.live
    assert y.shape == x.shape
    # The result and one float32 a row; in pieces also a float32 copy of x.
    assert kept == {"cpu": 64 * 128 * (2 + 4) + 256, "cuda": 64 * 128 * 2 + 512}[kind]
