"""events.jsonl survives being cut at any byte, and a resumed run's lines replace those it repeats."""

import json
import math
from datetime import UTC, datetime

from ltxforge.events import ClipJudged, Note, StepDone
from ltxforge.trackers.jsonl import EventLog, last_per_step, next_attempt, read_events


def step_done(step, loss=1.0):
    return StepDone(step=step, steps=9, loss=loss, grad_norm=0.5, learning_rate=1e-4, epoch=0.1, sigma=(0.25,))


def test_a_line_holds_time_attempt_and_the_event(tmp_path):
    before = datetime.now(UTC)
    with EventLog(tmp_path / "run" / "events.jsonl") as log:
        log(step_done(1, math.nan))
    [line] = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["time"].endswith("Z")
    assert abs((datetime.fromisoformat(event["time"]) - before).total_seconds()) < 60
    assert (event["attempt"], event["event"], event["step"], event["loss"]) == (1, "StepDone", 1, "nan")
    assert event["sigma"] == [0.25]


def test_a_line_is_on_disk_before_the_next_event(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for count in range(1, 4):
            log(Note("é\ud800\n"))
            assert path.read_bytes().count(b"\n") == count
    assert [event["text"] for event in read_events(path)] == ["é\ud800\n"] * 3


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_takes_new_ones(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path, attempt=1) as log:
        log(step_done(1))
        log(ClipJudged("a\x1b[2J.mp4", "ok"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with EventLog(path, attempt=2) as log:
            log(step_done(2))
        events = list(read_events(path))
        # A line whose newline alone was lost is whole.
        expected = (cut >= first - 1) + (cut >= len(whole) - 1) + 1
        assert len(events) == expected
        assert events[-1]["step"] == 2 and events[-1]["attempt"] == 2


def test_nuls_and_foreign_lines_are_skipped(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log(step_done(1))
    path.write_bytes(b"\0" * 50 + path.read_bytes() + b"\0" * 9 + b'[1]\n3\n{"a": 1}\n\xff\xfe\n' + b"[" * 100_000)
    assert [event["step"] for event in read_events(path)] == [1]


def test_attempts_count_on_and_the_last_line_per_step_wins(tmp_path):
    path = tmp_path / "events.jsonl"
    assert next_attempt(path) == 1 and list(read_events(path)) == []
    with EventLog(path) as log:
        for step in (1, 2, 3):
            log(step_done(step, loss=1.0))
    with EventLog(path) as log:
        for step in (4, 2, 3):
            log(step_done(step, loss=2.0))
    assert next_attempt(path) == 3
    last = last_per_step(read_events(path))
    assert list(last) == [1, 2, 3, 4]
    assert [(event["attempt"], event["loss"]) for event in last.values()] == [(1, 1.0), (2, 2.0), (2, 2.0), (2, 2.0)]
