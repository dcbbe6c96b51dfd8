"""The loss curve, parsed as XML: its points are the data, its numbers are on its axes, its scales are sane."""

import random
from xml.etree import ElementTree

import numpy as np
import pytest

from ltxforge.events import PlanMade, Resumed, StepDone
from ltxforge.trackers.jsonl import EventLog
from ltxforge.ui.loss_curve import MOST_POINTS, draw, loss_curve_svg, smoothing_window, step_ticks, ticks

SVG = "{http://www.w3.org/2000/svg}"


def data(count, seed=0):
    rng = random.Random(seed)
    return [(step, rng.lognormvariate(-1, 0.5), 1e-4 * min(1, step / 10)) for step in range(1, count + 1)]


def line(root, kind):
    found = next(e for e in root.iter(SVG + "polyline") if kind in (None, e.get("class")))
    return np.array([[float(number) for number in pair.split(",")] for pair in found.get("points").split()])


def texts(root):
    return [element.text for element in root.iter(SVG + "text")]


def read_back(root, axis):
    """Pixel → value, from the labelled grid lines of the loss (above) or the learning rate (below)."""
    labels = [e for e in root.iter(SVG + "text") if e.get("text-anchor") == "end"]
    pairs = [(float(e.get("y")) - 4, float(e.text)) for e in labels if e.text[0].isdigit()]
    pairs = [pair for pair in pairs if (pair[0] < 370) == (axis == "loss")]
    slope, start = np.polyfit(*zip(*pairs, strict=True), 1)
    return lambda pixel: slope * pixel + start


def test_points_map_back_to_steps_losses_and_rates():
    points = data(200)
    root = ElementTree.fromstring(loss_curve_svg(points))
    steps, losses, rates = np.array(points).T
    raw, rate = line(root, "raw"), line(root, "rate")
    assert raw.shape == (200, 2)
    assert np.corrcoef(raw[:, 0], steps)[0, 1] > 1 - 1e-9
    span = losses.max() - losses.min()
    assert read_back(root, "loss")(raw[:, 1]) == pytest.approx(losses, abs=0.004 * span)
    assert read_back(root, "rate")(rate[:, 1]) == pytest.approx(rates, abs=2e-6)


def test_the_thick_line_is_the_mean_that_the_picture_states():
    points = data(200)
    root = ElementTree.fromstring(loss_curve_svg(points))
    losses, window = np.array(points)[:, 1], smoothing_window(200)
    expected = [losses[max(0, i - window // 2) : i + window // 2 + 1].mean() for i in range(200)]
    found = read_back(root, "loss")(line(root, "smooth")[:, 1])
    assert found == pytest.approx(expected, abs=0.01)
    assert any(f"mean of {window} steps around each" in text for text in texts(root))


def test_the_sound_has_its_own_lines_and_a_legend():
    points = data(200)
    sound = [(step, 2 + value) for step, value, _ in points if step % 2]
    root = ElementTree.fromstring(loss_curve_svg(points, sound=sound))
    of_sound = next(e for e in root.iter(SVG + "polyline") if e.get("class") == "raw-sound")
    drawn = np.array([[float(number) for number in pair.split(",")] for pair in of_sound.get("points").split()])
    assert read_back(root, "loss")(drawn[:, 1]) == pytest.approx([value for _, value in sound], abs=0.02)
    steps = np.array([step for step, *_ in points])
    x = np.polyfit(steps, line(root, "raw")[:, 0], 1)
    assert drawn[:, 0] == pytest.approx(np.polyval(x, [step for step, _ in sound]), abs=0.01)
    keys = {e.get("class") for e in root.iter(SVG + "line")} & {"smooth", "smooth-sound"}
    assert keys == {"smooth", "smooth-sound"}
    plain = ElementTree.fromstring(loss_curve_svg(points))
    assert not any(word in text for text in texts(plain) for word in ("video", "sound"))


def test_each_line_s_numbers_stand_beside_its_name():
    points = data(200)
    sound = [(step, 2 + value) for step, value, _ in points if step % 2]
    found = texts(ElementTree.fromstring(loss_curve_svg(points, sound=sound)))
    window = smoothing_window(200)
    for name, curve in (("video", [point[:2] for point in points]), ("sound, in 100 of 200 steps", sound)):
        values = np.array([value for _, value in curve])
        means = [values[max(0, i - window // 2) : i + window // 2 + 1].mean() for i in range(len(values))]
        lowest = int(np.argmin(means))
        numbers = (
            f"step {curve[-1][0]}: {values[-1]:.4f} · mean now {means[-1]:.4f}, lowest {means[lowest]:.4f} at"
            f" {curve[lowest][0]}"
        )
        assert f"{name} · {numbers}" in found
    alone = texts(ElementTree.fromstring(loss_curve_svg(points)))
    assert any(text.startswith(f"step 200: {points[-1][1]:.4f} · mean now") for text in alone)


@pytest.mark.parametrize("alone", [False, True])
def test_the_legend_has_a_band_of_its_own(alone):
    points = data(60)
    sound = [] if alone else [(step, 30.0) for step, *_ in points]  # the top of the picture
    root = ElementTree.fromstring(loss_curve_svg(points, "long", [20], sound, alone))
    lines = list(root.iter(SVG + "polyline")) + [e for e in root.iter(SVG + "line") if e.get("class") == "resume"]
    drawn = [float(pair.split(",")[1]) for e in lines for pair in e.get("points", "").split()]
    drawn += [float(e.get(key)) for e in lines for key in ("y1", "y2") if e.get(key)]
    legend = [float(e.get("y")) for e in root.iter(SVG + "text") if e.text.startswith(("video ·", "sound"))]
    assert len(legend) == 2 - alone
    assert max(legend) + 4 <= min(drawn)
    assert min(legend) - 13 >= max(float(e.get("y")) for e in root.iter(SVG + "text") if "thick line" in e.text) - 1


def test_everything_stays_inside_the_picture():
    for points in (data(2), data(3000), [(1, 5.0, 1e-4)] * 1, [(n, 0.25, 0.0) for n in range(1, 9)], [(7, 0.0, 0.0)]):
        root = ElementTree.fromstring(loss_curve_svg(points))
        _, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter():
            numbers = element.get("points", "").replace(",", " ").split()
            xs = numbers[::2] + [element.get(key) for key in ("x", "x1", "x2", "cx") if element.get(key)]
            ys = numbers[1::2] + [element.get(key) for key in ("y", "y1", "y2", "cy") if element.get(key)]
            assert all(0 <= float(x) <= width for x in xs) and all(0 <= float(y) <= height for y in ys)


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    points = data(50_000)
    points[31_415] = (31_416, 99.0, 1e-4)
    text = loss_curve_svg(points)
    root = ElementTree.fromstring(text)
    raw = line(root, "raw")
    assert len(raw) <= MOST_POINTS + 2 and len(text) < 150_000
    assert read_back(root, "loss")(raw[:, 1].min()) == pytest.approx(99, abs=0.5)
    assert (np.diff(raw[:, 0]) >= 0).all()


def test_names_are_escaped_and_resumes_are_marked():
    root = ElementTree.fromstring(loss_curve_svg(data(100), "a <b> & \x1b[2J", [40, 60, 4000]))
    assert "Loss of a <b> & \\x1b[2J" in texts(root)
    marks = [e for e in root.iter(SVG + "line") if e.get("class") == "resume"]
    raw = line(root, "raw")
    assert [float(e.get("x1")) for e in marks] == pytest.approx([raw[39, 0], raw[59, 0]], abs=0.01)
    assert any("2 resumes" in text for text in texts(root))


@pytest.mark.parametrize("bounds", [(0, 1), (0.21, 0.23), (-3, 3e4), (1e-7, 5e-7), (0, 0.999)])
def test_ticks_are_round_even_and_inside(bounds):
    found = ticks(*bounds, 8)
    assert 2 <= len(found) <= 8
    assert all(bounds[0] - 1e-9 <= tick <= bounds[1] * (1 + 1e-9) for tick in found)
    spacing = np.diff(found)
    assert spacing == pytest.approx([spacing[0]] * len(spacing))
    assert f"{spacing[0]:e}"[0] in "125" and float(f"{spacing[0]:.0e}") == pytest.approx(spacing[0])


def test_step_ticks_name_whole_steps_and_the_first():
    for last in (2, 7, 60, 1000, 123_456):
        found = step_ticks(1, last)
        assert found[0] == 1 and found == sorted(set(found)) and found[-1] <= last


def test_drawing_from_a_resumed_runs_events(tmp_path):
    log, picture = tmp_path / "events.jsonl", tmp_path / "loss.svg"
    assert not draw(log, picture) and not picture.exists()

    def step_done(step, value):
        return StepDone(step, 9, value, 0.1, 1e-4, 0.0)

    with EventLog(log) as emit:
        emit(PlanMade({"name": "my-run"}))
        for step, value in [(1, 4.0), (2, 3.0), (3, float("nan")), (4, 50.0)]:
            emit(step_done(step, value))
    with EventLog(log) as emit:
        emit(Resumed(2, "checkpoints/step-000002"))
        for step, value in [(3, 2.0), (4, 1.0)]:
            emit(step_done(step, value))
    with log.open("ab") as file:
        file.write(b'{"event": "StepDone", "step": 5, "lo')
    assert draw(log, picture)
    root = ElementTree.parse(picture).getroot()
    values = read_back(root, "loss")(line(root, "raw")[:, 1])
    assert values == pytest.approx([4, 3, 2, 1], abs=0.02)
    assert "Loss of my-run" in texts(root)
    assert len([e for e in root.iter() if e.get("class") == "resume"]) == 1


@pytest.mark.parametrize("alone", [False, True])
def test_sound_is_drawn_where_it_stood_beside_a_video(tmp_path, alone):
    log, picture = tmp_path / "events.jsonl", tmp_path / "loss.svg"
    with EventLog(log) as emit:
        for step in range(1, 9):
            heard = (
                {}
                if step == 3 and not alone
                else {"audio_loss": 1.0 if alone else 2.0, "audio_sigma": (0.5 if alone else 0.25,)}
            )
            emit(StepDone(step, 9, 1.0, 0.1, 1e-4, 0.0, (0.5,), **heard))
    assert draw(log, picture)
    root = ElementTree.parse(picture).getroot()
    classes = {element.get("class") for element in root.iter(SVG + "polyline")}
    of_sound, of_video = {"raw-sound", "smooth-sound"}, {"raw", "smooth"}
    assert classes - {"rate"} == (of_sound if alone else of_sound | of_video)
    names = [text.split(" · ")[0] for text in texts(root) if " · step" in text]
    assert names == (["sound"] if alone else ["video", "sound, in 7 of 8 steps"])
