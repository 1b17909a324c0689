"""Where no bar can be drawn, lines say how far a command is and how long it will take."""

import pytest

from marrq.cli import common


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test moves."""
    now = [0.0]
    monkeypatch.setattr("marrq.cli.common.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_each_half_minute_with_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with common.progress_bars(quantizing=None) as [bar]:
        for done in range(1, 13):
            bar.show(done, 12, "α 0.40")
            clock[0] += 20
    assert capsys.readouterr().err.splitlines() == [
        f"quantizing: {done} of 12, about {left} left"
        for done, left in [(3, "0:03:00"), (5, "0:02:20"), (7, "0:01:40"), (9, "0:01:00")]
    ] + ["quantizing: 11 of 12, about 0:00:20 left"]


def test_a_later_stage_is_not_charged_with_the_time_of_an_earlier_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with common.progress_bars(refining=100) as [bar]:
        clock[0] = 1000
        bar.advance(10)
        clock[0] = 1040
        bar.advance(40)
    assert capsys.readouterr().err == "refining: 50 of 100, about 0:00:50 left\n"


def test_a_second_pass_of_a_stage_is_not_charged_with_what_came_between(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with common.progress_bars(refining=None) as [bar]:
        bar.show(1, 2, "full precision")
        bar.show(2, 2, "full precision")
        clock[0] = 1000
        bar.show(1, 101, "loss 2.000")
        clock[0] = 1040
        bar.show(41, 101, "loss 1.500")
    assert capsys.readouterr().err == "refining: 41 of 101, about 0:01:00 left\n"


def test_what_is_done_in_seconds_and_by_other_processes_says_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with common.progress_bars(runs=2) as [bar]:
        bar.advance()
        clock[0] = 29
        bar.advance()
    with common.progress_bars(shown=False, runs=2) as [bar]:
        bar.advance()
        clock[0] = 100
        bar.advance()
    assert capsys.readouterr().err == ""
