"""Real runs of the tiny model in real processes, and what is compared of them: tensors, moments, logged numbers.

`work` is a fresh folder with a recipe, in which `work.run()` and `work.start()` run ltxforge; `reference` is what an
uninterrupted run of that recipe gave. Which model the recipe trains is `family`, which a test gives by parametrising
it: LTX-Video unless it says "ltx2", whose recipe trains picture and sound of the same clips. Children come from
`fork_server.py`. POSIX only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltxforge.media.write import write_video
from ltxforge.trackers.jsonl import last_per_step, read_events

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_SECONDS = 120.0
RECIPE = """
[model]
base = "{base}"

[run]
seed = 7
steps = 12

[[dataset]]
path = "clips"
resolution = "64x64"
frames = 9

[training]
batch_size = 2
accumulate = 2

[optimizer]
learning_rate = 1e-3
schedule = "cosine"
warmup_steps = 2

[lora]
rank = 4
dropout = 0.1

[conditioning]
first_frame = 0.5
caption_dropout = 0.25
{prompts}

[checkpoint]
every = 3
keep = 2

[validation]
every = {validate_every}
at_start = false
steps = 2
guidance = 1
{guidance}

[[validation.prompt]]
name = "waves"
prompt = "Waves of colour."
"""
# What the recipe of a family says. A sample with sound costs as much as nine steps: who wants some asks for them.
FAMILIES = {
    "ltx-video": {"base": "tiny/ltx-video", "prompts": "", "validate_every": 8, "guidance": ""},
    "ltx2": {
        "base": "tiny/ltx2", "prompts": "prompt_tokens = 128", "validate_every": 0,
        "guidance": "audio_guidance = 1\nstg = 0\nmodality_guidance = 1",
    },
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing here runs on Windows, which cannot fork."""
    if sys.platform == "win32":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="these tests fork"))


class Server:
    """The forking server (see `fork_server.py`)."""

    def __init__(self, hash_seed: int = 0) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **one, "PYTHONPATH": path, "PYTHONHASHSEED": str(hash_seed), "CI": "1"}
        environment.pop("WORLD_SIZE", None)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8",
        )  # fmt: skip
        assert json.loads(self._process.stdout.readline()) == {"threads": 1}, "it must not have threads to fork"

    def ask(self, **order: Any) -> dict[str, Any]:
        """One order and its answer."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server; its children go their own way."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class Child:
    """A process that runs ltxforge."""

    server: Server
    pid: int
    log: Path
    run: Path
    code: int | None = None

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8")

    def is_alive(self) -> bool:
        """Whether it still runs."""
        if self.code is None:
            self.code = self.server.ask(do="wait", pid=self.pid, block=False)["code"]
        return self.code is None

    def signal(self, number: int) -> None:
        """Send it a signal; a process that is gone is passed over."""
        if self.is_alive():
            os.kill(self.pid, number)

    def go_on(self) -> None:
        """Let it go on once it really stands still: an event is logged a moment before its signal is sent."""
        self.until(self.stands_still, "its stop")
        self.signal(signal.SIGCONT)

    def stands_still(self) -> bool:
        """Whether the process is stopped; where the system has no /proc to tell, it is taken for stopped."""
        state = Path(f"/proc/{self.pid}/stat")
        return not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"

    def wait(self) -> Child:
        """Wait for its end; one that hangs is killed, which shows in its code."""
        if self.code is None:
            hang = threading.Timer(PATIENCE_SECONDS, os.kill, (self.pid, signal.SIGKILL))
            hang.start()
            self.code = self.server.ask(do="wait", pid=self.pid, block=True)["code"]
            hang.cancel()
        return self

    def until(self, condition: Callable[[], Any], what: str = "") -> None:
        """Watch a running child until something is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.is_alive(), f"it ended with {self.code} before {what or condition}:\n{self.text}"
            assert time.monotonic() < deadline, f"it never came to {what or condition}:\n{self.text}"
            time.sleep(0.002)

    def require(self, code: int) -> Child:
        """Wait, and insist on this exit status and on messages instead of tracebacks."""
        self.wait()
        assert self.code == code, f"exit status {self.code}, not {code}:\n{self.text}"
        assert "Traceback" not in self.text, self.text
        return self


@dataclass
class Work:
    """A folder with a recipe, clips and a cache, in which runs are started."""

    folder: Path
    servers: list[Server]
    children: list[Child] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.folder / "recipe.toml"

    def out(self, name: str = "run") -> Path:
        """A run directory."""
        return self.folder / name

    def change(self, old: str, new: str) -> None:
        """Edit the recipe."""
        text = self.recipe.read_text(encoding="utf-8")
        assert old in text
        self.recipe.write_text(text.replace(old, new), encoding="utf-8")

    def start(
        self, *sets: str, out: str = "run", verb: str = "run", environment: dict[str, str] | None = None, **hooks: Any
    ) -> Child:
        """Start ltxforge with `--set` for each of `sets`; hooks are `signal_at`, `die_in` and `constants` of the fork
        server.

        With several servers, processes that follow each other have different hash seeds, so that no result can depend
        on the order of a set.
        """
        arguments = [verb, str(self.recipe), "--out", str(self.out(out)), "--plain"]
        for text in sets:
            arguments += ["--set", text]
        log = self.folder / f"log-{len(self.children)}.txt"
        log.touch()
        return self._start(arguments, log, out, environment or {}, hooks)

    def start_in_terminal(self, terminal: str, out: str = "run") -> Child:
        """Start ltxforge with a live display in a terminal, given by name."""
        arguments = ["run", str(self.recipe), "--out", str(self.out(out))]
        return self._start(arguments, Path(terminal), out, {"CI": "", "TERM": "xterm"}, {})

    def _start(
        self, arguments: list[str], log: Path, out: str, environment: dict[str, str], hooks: dict[str, Any]
    ) -> Child:
        server = self.servers[len(self.children) % len(self.servers)]
        answer = server.ask(
            do="start", arguments=arguments, folder=str(self.folder), log=str(log), environment=environment, **hooks
        )
        self.children.append(Child(server, answer["pid"], log, self.out(out)))
        return self.children[-1]

    def run(self, *sets: str, code: int = 0, **options: Any) -> Child:
        """Run ltxforge to its end and insist on an exit status."""
        return self.start(*sets, **options).require(code)

    def events(self, kind: str, out: str = "run") -> list[dict[str, Any]]:
        """Logged events of one kind, all attempts."""
        return [event for event in read_events(self.out(out) / "events.jsonl") if event["event"] == kind]

    def steps(self, out: str = "run") -> list[int]:
        """The checkpoints that are there."""
        return sorted(int(path.name[5:]) for path in (self.out(out) / "checkpoints").glob("step-*"))

    def outcome(self, out: str = "run", step: int = 12) -> dict[str, Any]:
        """What two runs must agree on (see `outcome`)."""
        return outcome(self.out(out), step)

    def end(self) -> None:
        """Leave no process behind."""
        for child in self.children:
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                child.wait()


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A safetensors file's tensors as (dtype, shape, bytes), read by the format's own definition."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), content[8 + size :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


LOGGED = (
    "loss", "grad_norm", "learning_rate", "epoch", "sigma", "loss_by_sample", "audio_loss", "audio_sigma",
    "audio_loss_by_sample",
)  # fmt: skip


def outcome(run: Path, step: int = 12) -> dict[str, Any]:
    """What two runs must agree on to the last bit: LoRA, adapter, moments, and the last log line of each step."""
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    found: dict[str, Any] = {}
    for part, path in (
        ("lora", run / "lora.safetensors"), ("checkpoint's lora", checkpoint / "lora.safetensors"),
        ("adapter", checkpoint / "adapter.safetensors"), ("optimizer", checkpoint / "optimizer.safetensors"),
    ):  # fmt: skip
        found |= {f"{part} {name}": value for name, value in tensors(path).items()}
    for number, event in last_per_step(read_events(run / "events.jsonl")).items():
        found |= {f"step {number} {name}": event[name] for name in LOGGED}
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what differs, is missing or is new."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run, with the folder that it ran in."""

    folder: Path
    outcome: dict[str, Any]

    def require(self, run: Path, step: int = 12) -> None:
        """Insist that a run came to the same bits."""
        assert differences(outcome(run, step), self.outcome) == []


@pytest.fixture(scope="session")
def servers() -> Iterator[list[Server]]:
    """One forking server."""
    server = Server(hash_seed=1)
    yield [server]
    server.close()


@pytest.fixture(scope="session")
def two_servers(servers: list[Server]) -> Iterator[list[Server]]:
    """Two of them, with different hash seeds."""
    server = Server(hash_seed=2)
    yield [*servers, server]
    server.close()


SOUND_RATE = 16000
MUTE, SILENT, WITH_FILE_BESIDE = 0, 2, 3  # the other clips have a sound track alone


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small clips with captions: seven windows of nine frames, of which five can be heard."""
    folder = tmp_path_factory.mktemp("user") / "clips"
    folder.mkdir()
    y, x = np.mgrid[:64, :64]
    for number in range(5):
        times = range(20 if number % 2 else 12)
        channels = [(x * (number + 1) + 4 * t, y * 3 + t * number, x + y + 9 * t * number) for t in times]
        frames = np.stack([np.stack(three, axis=-1) % 256 for three in channels]).astype(np.uint8)
        sound = None if number == MUTE else chirp(number) * (number != SILENT)
        write_video(folder / f"clip{number}.mp4", frames, 25, threads=1, audio=sound, sample_rate=SOUND_RATE)
        (folder / f"clip{number}.txt").write_text(f"Moving waves, number {number}.\n", encoding="utf-8")
    write_wav(folder / f"clip{WITH_FILE_BESIDE}.wav", chirp(9))
    for path in folder.iterdir():
        os.utime(path, (1.7e9, 1.7e9))
    return folder


def chirp(number: int) -> np.ndarray:
    """A second of a rising tone, float32 [1, samples]; another one for each number."""
    seconds = np.arange(SOUND_RATE, dtype=np.float32)[None] / SOUND_RATE
    return 0.3 * np.sin(2 * np.pi * (100 * (number + 1) * seconds + 400 * seconds**2))


def write_wav(path: Path, sound: np.ndarray) -> None:
    """A mono sound file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SOUND_RATE, sound.shape[1], "NONE", ""))
        file.writeframes((sound[0] * 32767).astype("<i2").tobytes())


@pytest.fixture
def family() -> str:
    """Which model the recipe trains, where the test does not say."""
    return "ltx-video"


def make_work(folder: Path, family: str, clips: Path, servers: list[Server]) -> Work:
    """A folder with the family's recipe and a link to the clips."""
    (folder / "recipe.toml").write_text(RECIPE.format(**FAMILIES[family]), encoding="utf-8")
    (folder / "clips").symlink_to(clips)
    return Work(folder, servers)


@pytest.fixture(scope="session")
def reference_of(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, servers: list[Server]
) -> Callable[[str], Reference]:
    """Gives the uninterrupted run of a family's recipe, made when it is first asked for."""

    @cache
    def reference_of(family: str) -> Reference:
        work = make_work(tmp_path_factory.mktemp("reference"), family, clips, servers)
        work.run()
        return Reference(work.folder, work.outcome())

    return reference_of


@pytest.fixture
def reference(reference_of: Callable[[str], Reference], family: str) -> Reference:
    """The uninterrupted run of the recipe."""
    return reference_of(family)


@pytest.fixture
def fresh(tmp_path: Path, family: str, clips: Path, servers: list[Server]) -> Iterator[Work]:
    """A folder with a recipe and an empty cache."""
    work = make_work(tmp_path, family, clips, servers)
    yield work
    work.end()


@pytest.fixture
def work(fresh: Work, reference: Reference) -> Work:
    """A folder with a recipe and a filled cache of its own: starting takes no encoding."""
    shutil.copytree(reference.folder / "cache", fresh.folder / "cache")
    return fresh


@pytest.fixture
def finished(work: Work, reference: Reference) -> Work:
    """The same with a copy of the finished reference run in it."""
    shutil.copytree(reference.folder / "run", work.out())
    return work


@pytest.fixture
def clean(tmp_path: Path, family: str, clips: Path, two_servers: list[Server]) -> Iterator[Work]:
    """A folder with a recipe and an empty cache; processes that follow each other have different hash seeds."""
    work = make_work(tmp_path, family, clips, two_servers)
    yield work
    work.end()


@pytest.fixture
def primed(clean: Work, reference: Reference) -> Work:
    """The same with a filled cache."""
    shutil.copytree(reference.folder / "cache", clean.folder / "cache")
    return clean


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Adds a line to the counts that `tests/conftest.py` prints at the end."""
    return lambda text: record_property("count", text)
