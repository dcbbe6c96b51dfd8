"""What is known of GPUs that one may train on: memory, units, rates. Data, and how a card is found by name or by size.

Rates are what makers publish, without sparsity, at the boost clock, products accumulated in fp32 (int8 in int32); what
a step reaches of them is for `memory/costs.py` to say. The bus is one direction of PCIe as copies from pinned memory
reach it. A card that is not listed gets a typical one's rates and is said to be *assumed*. Torch-free; decides nothing.

Sources: NVIDIA's architecture whitepapers, with tables of the cards' tensor rates by accumulation (Volta V1.1, Turing
v01, Ampere GA100 and GA102 v2, Ada v1.1, Hopper v1, RTX Blackwell v1.1), its data sheets (T4, A10, A30, A40, L4, L40,
L40S, RTX A and Ada series, RTX PRO Blackwell, H100, H200, B200), AWS' EC2 page for the A10G, and AMD's for Instinct and
Radeon.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

GIB = 2**30
PCIE_3, PCIE_4, PCIE_5 = 12.0, 24.0, 48.0
"""GB/s of 16 lanes in one direction, from pinned memory: about four fifths of what the standard says."""


@dataclass(frozen=True)
class Card:
    """One GPU. `arch` is 10·major + minor on CUDA and AMD's name of the chip elsewhere.

    Attributes:
        memory_gib: as sold.
        bf16, fp16, fp32, int8, fp8: 10^12 operations a second, a product and a sum being two; 0 without such units.
        memory_gbs, bus_gbs: 10^9 bytes a second from its own memory, and from the host's.
        assumed: whether the rates are another card's, because this one is not known.
    """

    name: str
    memory_gib: float
    arch: int | str
    bf16: float
    fp16: float
    fp32: float
    int8: float
    fp8: float
    memory_gbs: float
    bus_gbs: float
    assumed: bool = False

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16 in units of its own."""
        return self.bf16 > 0

    @property
    def kind(self) -> str:
        """cuda or rocm."""
        return "cuda" if isinstance(self.arch, int) else "rocm"

    @property
    def memory_bytes(self) -> int:
        """As sold."""
        return round(self.memory_gib * GIB)


def _nvidia(arch: int, bus: float, rows: str) -> list[Card]:
    """Cards of one architecture. A row is name, GiB, 16-bit, fp32 and int8 rates, GB/s, and the bus where it differs.

    From 8.9 on fp8 is twice as fast as 16 bits; bf16 came with 8.0.
    """
    cards = []
    for row in rows.strip().splitlines():
        name, memory, half, single, eighth, speed, *own_bus = (cell.strip() for cell in row.split("|"))
        rate = float(half)
        cards.append(
            Card(
                name, float(memory), arch, rate if arch >= 80 else 0.0, rate, float(single), float(eighth),
                2 * rate if arch >= 89 else 0.0, float(speed), float(own_bus[0]) if own_bus else bus,
            )
        )  # fmt: skip
    return cards


CARDS: tuple[Card, ...] = (
    *_nvidia(70, PCIE_3, """
        V100|16|125|15.7|62.8|900
        V100|32|125|15.7|62.8|900
    """),
    *_nvidia(75, PCIE_3, """
        T4|16|65|8.1|130|320
        Quadro RTX 6000|24|65.2|16.3|261|672
        Quadro RTX 8000|48|65.2|16.3|261|672
        TITAN RTX|24|65.2|16.3|261|672
        RTX 2060|6|25.8|6.5|103|336
        RTX 2060|12|28.6|7.2|115|336
        RTX 2070|8|29.9|7.5|119|448
        RTX 2080|8|40.3|10.1|161|448
        RTX 2080 Ti|11|53.8|13.4|215|616
    """),
    *_nvidia(80, PCIE_4, """
        A30|24|165|10.3|330|933
        A100|40|312|19.5|624|1555
        A100|80|312|19.5|624|2039
    """),
    *_nvidia(86, PCIE_4, """
        RTX 3050 Laptop|4|14.3|7.1|57|192|12
        RTX 3050|8|18.2|9.1|73|224|12
        RTX 3060 Laptop|6|26.2|13.1|105|336
        RTX 3060|12|25.5|12.7|102|360
        RTX 3060 Ti|8|32.4|16.2|130|448
        RTX 3070|8|40.6|20.3|163|448
        RTX 3070 Ti|8|43.5|21.7|174|608
        RTX 3080|10|59.5|29.8|238|760
        RTX 3080|12|61.3|30.6|245|912
        RTX 3080 Ti|12|68.2|34.1|273|912
        RTX 3090|24|71|35.6|284|936
        RTX 3090 Ti|24|80|40|320|1008
        A10|24|125|31.2|250|600
        A10G|24|70|31.5|140|600
        A40|48|149.7|37.4|299|696
        RTX A4000|16|76.7|19.2|153|448
        RTX A5000|24|111.1|27.8|222|768
        RTX A6000|48|154.8|38.7|310|768
    """),
    *_nvidia(89, PCIE_4, """
        RTX 4060|8|30.2|15.1|121|272|12
        RTX 4060 Ti|8|44.1|22.1|177|288|12
        RTX 4060 Ti|16|44.1|22.1|177|288|12
        RTX 4070|12|58.3|29.1|233|504
        RTX 4070 SUPER|12|71|35.5|284|504
        RTX 4070 Ti|12|80.2|40.1|321|504
        RTX 4070 Ti SUPER|16|88.2|44.1|353|672
        RTX 4080|16|97.5|48.7|390|717
        RTX 4080 SUPER|16|104.4|52.2|418|736
        RTX 4090|24|165.2|82.6|661|1008
        RTX 6000 Ada|48|364.2|91.1|728|960
        L4|24|121|30.3|242|300
        L40|48|181|90.5|362|864
        L40S|48|362|91.6|733|864
    """),
    *_nvidia(90, PCIE_5, """
        H100 PCIe|80|756|51|1513|2000
        H100|80|989|67|1979|3350
        H100 NVL|94|835|60|1671|3900
        GH200|96|989|67|1979|4000
        H200|141|989|67|1979|4800
    """),
    *_nvidia(100, PCIE_5, """
        B200|180|2250|75|4500|7700
    """),
    *_nvidia(120, PCIE_5, """
        RTX 5060|8|38.4|19.2|154|448|24
        RTX 5060 Ti|8|47.4|23.7|190|448|24
        RTX 5060 Ti|16|47.4|23.7|190|448|24
        RTX 5070|12|61.7|30.9|247|672
        RTX 5070 Ti|16|87.9|43.9|352|896
        RTX 5080|16|112.6|56.3|450|960
        RTX 5090|32|209.5|104.8|838|1792
        RTX PRO 6000|96|503.8|126|2015|1792
    """),
    Card("MI210", 64, "gfx90a", 181, 181, 22.6, 181, 0.0, 1638, PCIE_4),
    Card("MI250X", 64, "gfx90a", 191.5, 191.5, 23.9, 191.5, 0.0, 1638, PCIE_4),
    Card("MI300X", 192, "gfx942", 1307, 1307, 163.4, 2615, 2615, 5300, PCIE_5),
    Card("RX 7900 XTX", 24, "gfx1100", 122.8, 122.8, 61.4, 122.8, 0.0, 960, PCIE_4),
)  # fmt: skip

# Whose rates stand for a card of which only the memory is known: what many have, not what is best, with bf16 units, so
# that nobody gets a plan in fp32 who named no card. GiB → name.
_TYPICAL = {
    4: "RTX 3050 Laptop", 6: "RTX 3060 Laptop", 8: "RTX 4060", 10: "RTX 3080", 12: "RTX 4070", 16: "RTX 4080",
    24: "RTX 4090", 32: "RTX 5090", 48: "RTX 6000 Ada", 64: "MI210", 80: "H100", 96: "RTX PRO 6000", 141: "H200",
    180: "B200", 192: "MI300X",
}  # fmt: skip


_MAKERS = frozenset({"nvidia", "geforce", "tesla", "amd", "instinct", "radeon"})


def known_card(name: str, memory_bytes: int = 0) -> Card | None:
    """The card whose name stands in what a driver or a user calls it, or None.

    The longest name wins ("RTX 4070 Ti" is no RTX 4070), and of equal ones the nearest memory. Cards of notebooks share
    names with others; those are known whose row says so.
    """
    words = f" {' '.join(_words(name))} "
    if " max q " in words or " mobile " in words:
        return None
    named = (card for card in CARDS if f" {' '.join(_words(card.name))} " in words)
    found = [card for card in named if (" laptop " in words) == card.name.endswith(" Laptop")]
    if not found:
        return None
    longest = max(len(card.name) for card in found)
    size = memory_bytes / GIB
    return min((c for c in found if len(c.name) == longest), key=lambda c: abs(c.memory_gib - size) if size else 0)


def cards_called(name: str) -> list[str]:
    """The names of cards that a user may mean, however they are spaced: `"rtx4090"`, `"4090"`, `"GeForce 4070ti"`."""
    typed = "".join(word for word in _words(name) if word not in _MAKERS)
    return list(dict.fromkeys(card.name for card in CARDS if typed in _short_forms(card.name)))


def typical_card(memory_bytes: int) -> Card:
    """A card of which only the memory is known: that memory, with the rates of one of about its size, *assumed*."""
    size = memory_bytes / GIB
    nearest = min(_TYPICAL, key=lambda gib: (abs(gib - size), gib))
    like = known_card(_TYPICAL[nearest], nearest * GIB)
    assert like is not None
    return dataclasses.replace(like, memory_gib=size, assumed=True)


def card_of(name: str, memory_bytes: int, arch: int | str | None) -> Card:
    """The rates of the GPU that a driver names: its own, else those of one of its architecture, else of its size."""
    if card := known_card(name, memory_bytes):
        return dataclasses.replace(card, memory_gib=memory_bytes / GIB or card.memory_gib)
    alike = [card for card in CARDS if card.arch == arch]
    if not alike:
        return typical_card(memory_bytes)
    size = memory_bytes / GIB
    like = min(alike, key=lambda card: (abs(card.memory_gib - size), card.bf16, card.fp16))
    return dataclasses.replace(like, memory_gib=size, assumed=True)


def _short_forms(name: str) -> list[str]:
    """`"RTX 4070 Ti"` → rtx4070ti, 4070ti, ti."""
    words = _words(name)
    return ["".join(words[start:]) for start in range(len(words))]


def _words(name: str) -> list[str]:
    """`"NVIDIA A100-SXM4-80GB"` → nvidia, a100, sxm4, 80gb."""
    return "".join(letter if letter.isalnum() else " " for letter in name.casefold()).split()
