"""Where streamed weights wait: every byte comes back, nothing is held twice, and a disk's faults are said plainly."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltxforge.errors import DiskFullError, PlanError, RunError
from ltxforge.memory.host_buffer import HostBuffer, pages
from ltxforge.memory.simulated import SimulatedStreams
from ltxforge.memory.store import DiskStore, HostStore, require_folder
from ltxforge.memory.transfers import Plain
from ltxforge.memory.units import PAGE, offsets

CPU = torch.device("cpu")


def tensors(units: int = 4, seed: int = 0) -> dict[tuple[int, str], Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, str], Tensor] = {}
    for block in range(units):
        found[block, "a.weight"] = torch.randn(5 + block, 7, generator=draw)
        found[block, "a.scale"] = torch.randn((), generator=draw)
        found[block, "b.packed"] = torch.randint(0, 255, (301,), generator=draw, dtype=torch.uint8)
        found[block, "b.weight"] = torch.randn(4, 6, generator=draw, dtype=torch.bfloat16).t()
    return found


def filled(store, parked: dict[tuple[int, str], Tensor]):
    """The store with one unit per block, and what is where."""
    for key in sorted(parked, key=lambda key: key[1]):  # as a file may have them: block by block they do not come
        store.put(key, parked[key])
    units, lengths = [], []
    for block in sorted({block for block, _ in parked}):
        keys = [key for key in parked if key[0] == block]
        begins = offsets([parked[key].nbytes for key in keys])
        units.append(list(zip(keys, begins, strict=False)))
        lengths.append(begins[-1])
    store.seal(units, lengths)
    return units, lengths


def store_of(kind: str, transfers, folder: Path):
    return DiskStore(folder, CPU, transfers) if kind == "disk" else HostStore(CPU, transfers)


@pytest.mark.parametrize("transfers", [Plain, SimulatedStreams])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_every_byte_comes_back_however_far_ahead_it_is_asked_for(kind, transfers, tmp_path):
    """All units are sent before the first one is waited for: stages are not filled again before they are empty."""
    transfers, parked = transfers(), tensors()
    store = store_of(kind, transfers, tmp_path)
    units, lengths = filled(store, parked)
    slots = [torch.zeros(length, dtype=torch.uint8) for length in lengths]
    sent = []
    for number, length in enumerate(lengths):
        begun = transfers.begin(slots[number])
        sent.append(store.send(number, length, lambda source, begun=begun: transfers.copy(begun, source)))
    for arrival in sent:
        transfers.wait(arrival())
    for contents, slot in zip(units, slots, strict=True):
        for key, begin in contents:
            tensor = parked[key]
            assert begin % 256 == 0
            assert torch.equal(slot[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape), tensor), key
    store.close()


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_unit_s_beginning_can_come_alone(kind, tmp_path):
    parked = tensors(1)
    store = store_of(kind, Plain(), tmp_path)
    _, (length,) = filled(store, parked)
    slot = torch.zeros(length, dtype=torch.uint8)
    store.send(0, 512, lambda source: slot[: len(source)].copy_(source))()
    first = parked[0, "a.weight"]
    assert torch.equal(slot[: first.nbytes].view(torch.float32).view(first.shape), first)
    assert slot[256:260].view(torch.float32)[0] == parked[0, "a.scale"] and not slot[512:].any()


def test_a_fault_in_reading_ahead_shows(tmp_path, monkeypatch):
    """Without the wait before a stage is filled again, what it held has not left yet."""
    transfers = SimulatedStreams()
    monkeypatch.setattr(transfers, "finish", lambda copied: None)
    parked = tensors()
    store = DiskStore(tmp_path, CPU, transfers)
    _, lengths = filled(store, parked)
    slots = [torch.zeros(length, dtype=torch.uint8) for length in lengths]
    for number, length in enumerate(lengths):
        begun = transfers.begin(slots[number])
        store.send(number, length, lambda source, begun=begun: transfers.copy(begun, source))()
    transfers.drain()
    first = parked[0, "a.weight"]
    assert not torch.equal(slots[0][: first.nbytes].view(torch.float32).view(first.shape), first)
    store.close()


def test_a_folder_is_made_where_its_parent_is_there(tmp_path):
    """`memory.fit` names one in the cache, and a refusal one to type."""
    DiskStore(tmp_path / "streamed", CPU, Plain()).close()
    assert (tmp_path / "streamed").is_dir() and not list((tmp_path / "streamed").iterdir())
    with pytest.raises(PlanError, match="weights cannot be put here"):
        DiskStore(tmp_path / "unmounted" / "streamed", CPU, Plain())
    assert not (tmp_path / "unmounted").exists()


def test_memory_that_the_host_has_not_is_told_as_such():
    """And not as an OSError, which would pass for a fault of ours."""
    with pytest.raises(MemoryError, match="the host has no 1125899906842624 bytes more"):
        pages(2**50)


def test_buffers_have_pages_of_their_own_and_no_more_than_they_must():
    for length in (0, 256, PAGE, 10 * PAGE + 512):
        buffer = HostBuffer(length, CPU, lambda: None)
        assert len(buffer.bytes) == length and buffer.bytes.data_ptr() % PAGE == 0 and not buffer.locked
        assert buffer.bytes.untyped_storage().nbytes() == length


PEAK = """
import sys, torch
from ltxforge.memory.store import HostStore
from ltxforge.memory.transfers import Plain

def kilobytes(name):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

store, size = HostStore(torch.device("cpu"), Plain()), 5 * 2**20
given = torch.ones(size, dtype=torch.uint8)
before = kilobytes("VmRSS")
for number in range(40):
    store.put((number // 2, f"{number % 2}.weight"), given)
loaded = kilobytes("VmRSS")
store.seal([[((block, "0.weight"), 0), ((block, "1.weight"), size)] for block in range(20)], [2 * size] * 20)
print(*(round((at - before) / 1024) for at in (loaded, kilobytes("VmHWM"), kilobytes("VmRSS"))))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_the_host_never_holds_the_weights_twice():
    """Loaded, at the peak and in the end, in MiB: the weights, one unit beside them, and nothing else of note."""
    told = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, timeout=120).stdout
    loaded, peak, held = map(int, told.split())
    assert 200 <= loaded <= 215 and 200 <= held <= 215
    assert peak <= 225


def test_a_disk_holds_no_tensor_that_it_was_given(tmp_path):
    store = DiskStore(tmp_path, CPU, Plain())
    tensor = torch.zeros(10)
    given = weakref.ref(tensor)
    store.put((0, "weight"), tensor)
    del tensor
    assert given() is None


def test_a_disk_keeps_no_name_and_holds_no_more_than_its_stages(tmp_path):
    store = DiskStore(tmp_path, CPU, SimulatedStreams())
    _, lengths = filled(store, tensors(12))
    assert not list(tmp_path.iterdir())
    assert store.host_bytes == 2 * max(lengths) < 0.3 * sum(lengths)
    store.close()
    assert store.host_bytes == 0


HOLDS = """
import sys, torch
from pathlib import Path
from ltxforge.memory.store import DiskStore
from ltxforge.memory.transfers import Plain
store = DiskStore(Path(sys.argv[1]), torch.device("cpu"), Plain())
for block in range(8):
    store.put((block, "weight"), torch.full((2**20,), block, dtype=torch.uint8))
store.seal([[((block, "weight"), 0)] for block in range(8)], [2**20] * 8)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux")
def test_nothing_is_left_on_the_disk_by_a_process_that_was_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        held = [link for link in Path(f"/proc/{process.pid}/fd").iterdir() if str(tmp_path) in str(link.readlink())]
        assert [link.stat().st_size for link in held] == [8 * 2**20], "it waits there and nowhere else"
        assert not list(tmp_path.iterdir())
        process.kill()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_as_one(tmp_path, monkeypatch):
    full = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
    store = DiskStore(tmp_path, CPU, Plain())
    with pytest.raises(DiskFullError, match="No space left") as caught:
        store.put((0, "weight"), torch.zeros(10))
    assert str(tmp_path) in str(caught.value) and "Make room" in str(caught.value)


def test_a_limit_on_file_size_is_no_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    store = DiskStore(tmp_path, CPU, Plain())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(PlanError, match=os.strerror(errno.EFBIG)):
            store.put((0, "weight"), torch.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="Not a directory"):
        DiskStore(tmp_path / "file", CPU, Plain())


@pytest.mark.parametrize("transfers", [Plain, SimulatedStreams])
def test_a_file_that_cannot_be_read_again_stops_the_run(transfers, tmp_path):
    store = DiskStore(tmp_path, CPU, transfers())
    _, lengths = filled(store, tensors(2))
    store._file.truncate(100)
    with pytest.raises(RunError, match="cannot be read again"):
        store.send(1, lengths[1], lambda source: source)()
    store.close()


def test_reading_runs_beside_the_computation(tmp_path):
    """Who asks does not wait for the disk."""
    store = DiskStore(tmp_path, CPU, SimulatedStreams())
    _, lengths = filled(store, tensors(2))
    read = store._read

    def slowly(*given) -> None:
        time.sleep(0.05)
        read(*given)

    store._read = slowly
    began = time.perf_counter()
    arrival = store.send(0, lengths[0], lambda source: source.clone())
    asked = time.perf_counter() - began
    assert len(arrival()) == lengths[0] and time.perf_counter() - began >= 0.2 > 0.05 > asked
    store.close()


def test_a_folder_is_judged_before_anything_is_put_there(tmp_path):
    """As the store will find it; nothing is made."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for good in (tmp_path, tmp_path / "new"):
        require_folder(good)
    for bad in ("file", "file/below", "missing/new"):
        with pytest.raises(PlanError, match="cannot be put here"):
            require_folder(tmp_path / bad)
        with pytest.raises(PlanError, match="cannot be put here"):
            DiskStore(tmp_path / bad, CPU, Plain())
    require_folder(tmp_path / "a/cache/streamed", made=[tmp_path / "a/cache"])
    with pytest.raises(PlanError):
        require_folder(tmp_path / "b/streamed", made=[tmp_path / "a/cache"])
    with pytest.raises(PlanError):
        require_folder(tmp_path / "file/cache/streamed", made=[tmp_path / "file/cache"])
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
