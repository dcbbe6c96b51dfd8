"""Every error a user can meet, as one tree. Each message says what is wrong, where, and what to do.

    LtxforgeError
    ├── RecipeError        the text of the recipe is wrong (carries every located problem)
    ├── PlanError          the recipe is fine, but this machine or these files cannot carry it out
    ├── WeightsError       a weights file or folder is unreadable, incomplete or of another model
    ├── HubError           the Hugging Face Hub cannot be reached, or refuses
    ├── DataError          clips or cache entries that must not be trained on
    ├── RunError           the run directory belongs to another run, is in use, or holds nothing to resume
    ├── DeviceFullError    the device has too little memory for this plan; what was saved before is whole
    ├── DiskFullError      no space left; nothing already saved was touched
    ├── BenchmarkError     what `bench` measured is wrong, or slower than it must be; all of it is written
    ├── NonFiniteError     loss or gradient became NaN or infinite; the weights were not changed
    └── Stopped            a signal asked to stop; not a fault

`assert` is for our own mistakes, never for a user's.
"""

from __future__ import annotations

from ltxforge.printable import printable


class LtxforgeError(Exception):
    """Base of all errors that are shown without a traceback. `exit_code` is the process's exit status."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: `where: what`, then the remedy on a line of its own; control characters escaped."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{head}\n  {self.remedy}" if self.remedy else head
        return "\n".join(map(printable, text.split("\n")))


class RecipeError(LtxforgeError):
    """The recipe's text is wrong. `problems` holds all of them; the message is the full report."""

    exit_code = 2

    def __init__(self, problems: tuple, report: str) -> None:
        self.problems = problems
        super().__init__(report)


class PlanError(LtxforgeError):
    """A correct recipe that cannot be carried out here: missing files, too little memory, nothing to train on."""

    exit_code = 2


class WeightsError(LtxforgeError):
    """Weights that cannot be read, are incomplete, or belong to another model version."""

    exit_code = 2


class HubError(LtxforgeError):
    """The Hugging Face Hub cannot be reached or refuses access."""

    exit_code = 69


class DataError(LtxforgeError):
    """Clips or cached tensors that must not be trained on."""

    exit_code = 65


class RunError(LtxforgeError):
    """The run directory cannot be used as asked."""

    exit_code = 73


class DeviceFullError(LtxforgeError):
    """The device has too little memory. The last checkpoint is whole and the run can be resumed."""

    exit_code = 71


class KernelError(LtxforgeError):
    """A kernel, or compiled code, cannot be made or started on this device. The last checkpoint is whole."""

    exit_code = 70


class DiskFullError(LtxforgeError):
    """No space left on the device. What was saved before is untouched and the run can be resumed."""

    exit_code = 75


class NonFiniteError(LtxforgeError):
    """Loss or gradient norm is NaN or infinite. Raised before the weights change."""

    exit_code = 70


class BenchmarkError(LtxforgeError):
    """What `bench` measured is wrong, or slower than it must be. Raised after everything is measured and written."""


class Stopped(LtxforgeError):
    """A signal asked the run to stop. `signal_number` decides the exit status (128 + n)."""

    def __init__(self, signal_number: int, what: str, *, remedy: str = "") -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(what, remedy=remedy)
