"""Cards by what drivers call them, and by size alone."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ltxforge.cards import CARDS, GIB, card_of, known_card, typical_card


@pytest.mark.parametrize(
    ("name", "memory", "expected", "rate"),
    [
        ("NVIDIA GeForce RTX 4090", 23.5, "RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.6, "RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 4070 Ti", 11.6, "RTX 4070 Ti", 80.2),
        ("NVIDIA GeForce RTX 4070", 11.6, "RTX 4070", 58.3),
        ("NVIDIA GeForce RTX 3080", 11.8, "RTX 3080", 61.3),
        ("NVIDIA GeForce RTX 3080", 9.8, "RTX 3080", 59.5),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100", 312),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100", 312),
        ("Tesla T4", 14.6, "T4", 0),
        ("Tesla V100-SXM2-16GB", 15.8, "V100", 0),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100", 989),
        ("NVIDIA H100 PCIe", 79.1, "H100 PCIe", 756),
        ("NVIDIA H200", 139.8, "H200", 989),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "RTX 6000 Ada", 364.2),
        ("NVIDIA L40S", 44.4, "L40S", 362),
        ("AMD Instinct MI300X", 191.7, "MI300X", 1307),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 5.8, "RTX 3060 Laptop", 26.2),
        ("NVIDIA GeForce RTX 3060", 11.8, "RTX 3060", 25.5),
        ("rtx 4090", 0, "RTX 4090", 165.2),
    ],
)
def test_drivers_names_lead_to_the_card(name, memory, expected, rate):
    card = known_card(name, round(memory * GIB))
    assert card is not None and (card.name, card.bf16) == (expected, rate)
    assert card.has_bf16 == (rate > 0) and not card.assumed


def test_of_two_with_one_name_the_nearest_memory_is_meant():
    assert [known_card("NVIDIA A100", gib * GIB).memory_gbs for gib in (40, 80)] == [1555, 2039]


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080", "a GPU", "", "NVIDIA RTX 40900"]
)
def test_others_are_not_known_and_said_to_be_assumed(name):
    assert known_card(name) is None
    card = card_of(name, 16 * GIB, 89)
    assert card.assumed and (card.arch, card.memory_gib) == (89, 16)


def test_a_size_alone_is_a_typical_card_of_that_memory():
    for gib in (1, 4, 6, 7, 8, 10, 11, 12, 16, 20, 24, 40, 48, 80, 300):
        card = typical_card(gib * GIB)
        assert card.assumed and card.has_bf16 and card.memory_bytes == gib * GIB
    assert typical_card(12 * GIB).bf16 == known_card("RTX 4070").bf16
    rates = [typical_card(gib * GIB).bf16 for gib in (8, 12, 16, 24, 48, 80)]
    assert rates == sorted(rates)


def test_no_row_is_out_of_proportion():
    """A misplaced digit would stand out: tensor units beside plain ones, int8 beside 16 bits, memory beside both."""
    for card in CARDS:
        assert 1.5 <= card.fp16 / card.fp32 <= 32, card
        assert 0.4 <= card.int8 / card.fp16 <= 4.05, card
        assert card.bf16 in (0, card.fp16) and card.has_bf16 == (not isinstance(card.arch, int) or card.arch >= 80)
        assert 40 <= card.fp16 * 1000 / card.memory_gbs <= 500, card
        assert card.memory_gbs > 10 * card.bus_gbs, card
        assert re.fullmatch(r"gfx\w+", str(card.arch)) or int(card.arch) % 10 in (0, 5, 6, 9)
    assert len({(card.name, card.memory_gib) for card in CARDS}) == len(CARDS)


def test_cards_need_no_torch():
    program = "import sys, ltxforge.cards; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"
