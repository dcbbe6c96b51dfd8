"""What the verb `bench` asks of a kind of suite: how its cases become results on this machine.

Each kind has a module beside this one with a function `begin(cases, hardware, told, stop) -> Bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ltxforge.suites.case import Case, Result

Told = Callable[[str], None]
"""Takes a line about what goes on."""


@dataclass(frozen=True)
class Bench:
    """A suite that is ready to be measured; its cases were checked, and nothing big was built.

    Attributes:
        measure: case → result. Too little memory, a loss that is not finite and a red gate are results, not errors.
        how: field of a result → what its number means, for the results file.
        facts: what else its head says, such as ceilings measured in the same run.
    """

    measure: Callable[[Case], Result]
    how: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
