"""Addresses: stable for ever, different for different addresses, and evenly spread."""

from collections import Counter

import pytest

from ltxforge.randomness import address, permutation, uniform


def test_addresses_never_change():
    """A released run must continue with the same draws for ever: these values may not change."""
    assert address(42, "sigma", 1, 0) == 1947191997654731873
    assert address(42, "noise", 100, 3) == 2604246883159146649
    assert list(permutation("abcdef", 42, "order", 0, 1)) == ["a", "b", "c", "d", "f", "e"]


def test_every_part_of_an_address_counts():
    base = (42, "sigma", 1, 0)
    others = [(43, "sigma", 1, 0), (42, "noise", 1, 0), (42, "sigma", 2, 0), (42, "sigma", 1, 1), (42, "sigma", 1)]
    assert len({address(*parts) for parts in [base, *others]}) == 6
    assert address(1, "a", 23) != address(1, "a", 2, 3), "numbers must not run together"


def test_uniform_is_uniform():
    values = [uniform(7, "x", step) for step in range(20_000)]
    assert 0 <= min(values) and max(values) < 1
    counts = Counter(int(value * 10) for value in values)
    # 2000 expected per tenth, standard deviation 42: five of them.
    assert all(abs(count - 2000) < 212 for count in counts.values())


@pytest.mark.parametrize("size", [0, 1, 2, 17])
def test_a_permutation_holds_every_item_once(size):
    assert sorted(permutation(range(size), 3, "order", 5)) == list(range(size))


def test_permutations_are_evenly_spread():
    counts = Counter(tuple(permutation("abc", 1, "order", epoch)) for epoch in range(6000))
    assert len(counts) == 6 and all(abs(count - 1000) < 150 for count in counts.values())
