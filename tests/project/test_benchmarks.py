"""The benchmarks themselves: that they compute what they say, and that they still run."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest
from anyio import create_task_group
from starlette.types import Receive, Scope, Send

from benchmarks import behind, bridge, brokers, dispatch, outbox, served
from benchmarks.__main__ import TOPICS, keep, main, page, run, topic
from benchmarks.harness import (
    FINE_SLACK,
    SMALLEST,
    Comparison,
    Contender,
    Effort,
    Figure,
    Results,
    Run,
    Spread,
    Verdict,
    compare,
    ready,
)
from benchmarks.report import Bar, Panel, drawing, grid, number, table

KEPT = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
TINY = Effort(rounds=3, seconds=1e-6, scale="smallest")


def taking(*nanoseconds: float, calls: list[int] | None = None) -> Run:
    """A run whose operations take these times, one after the other and again from the start."""
    count = 0

    async def run(times: int) -> float:
        nonlocal count
        if calls is not None:
            calls.append(times)
        took = nanoseconds[count % len(nanoseconds)] * times
        count += 1
        return took

    return run


def comparison_of(**rounds: list[float]) -> Comparison:
    return Comparison({"size": 1}, rounds)


def test_a_ratio_is_taken_within_each_round_before_the_median() -> None:
    # The second round was disturbed, and so were both: medians of the times would say 3.5.
    comparison = comparison_of(floor=[10, 100, 20], other=[30, 200, 70])

    assert comparison.ratio("other") == Spread(3.0, 2.5, 3.25)


def test_a_ratio_can_be_taken_to_any_contender() -> None:
    comparison = comparison_of(floor=[1, 1], one=[10, 10], other=[5, 5])

    assert comparison.ratio("other", "one").median == 0.5


def test_what_is_compared_with_itself_is_the_same_even_if_it_is_nothing() -> None:
    assert comparison_of(kept=[0.0]).figures()[0].ratio == Spread(1, 1, 1)


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([3.0], Spread(3.0, 3.0, 3.0)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], Spread(3.0, 2.0, 4.0)),
        ([1.0, 2.0], Spread(1.5, 1.25, 1.75)),
        ([123456.0], Spread(123500.0, 123500.0, 123500.0)),
    ],
)
def test_a_spread_is_the_median_and_the_quartiles_to_four_digits(
    values: list[float], spread: Spread
) -> None:
    assert Spread.of(values) == spread


@pytest.mark.anyio
async def test_every_contender_is_measured_once_in_each_round() -> None:
    contenders = [ready("floor", taking(1000)), ready("other", taking(4000, 2000))]

    comparison = await compare({}, contenders, TINY)

    assert comparison.rounds["floor"] == [1000] * 3
    assert sorted(comparison.rounds["other"]) == [2000, 2000, 4000]


@pytest.mark.anyio
async def test_what_is_faster_than_the_clock_is_repeated_until_it_is_not() -> None:
    calls: list[int] = []

    await compare({}, [ready("fast", taking(1, calls=calls))], TINY.fewer(1))

    assert calls[0] == 1
    assert sum(calls[calls.index(max(calls)) + 1 :]) >= 1e-6 * 1e9


@pytest.mark.anyio
async def test_a_contender_with_a_batch_always_performs_that_many() -> None:
    calls: list[int] = []

    await compare({}, [ready("drain", taking(1, calls=calls), batch=500)], TINY)

    assert set(calls) == {500}


@pytest.mark.anyio
async def test_a_contender_that_fails_is_left_out_with_its_reason() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[Run]:
        raise RuntimeError("no room\nand more")
        yield taking(1)

    async def failing(times: int) -> float:
        raise LookupError("nobody listens")

    contenders = [
        ready("floor", taking(1)),
        Contender("broken", broken),
        ready("failing", failing),
    ]
    comparison = await compare({}, contenders, TINY, {"missing": "not installed"})

    assert list(comparison.rounds) == ["floor"]
    assert comparison.absent == {
        "missing": "not installed",
        "broken": "RuntimeError: no room",
        "failing": "LookupError: nobody listens",
    }


@pytest.mark.anyio
async def test_contenders_are_set_up_before_and_taken_down_after_all_rounds() -> None:
    trace: list[str] = []

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Run]:
        trace.append("up")

        async def run(times: int) -> float:
            trace.append("run")
            return 1e6

        yield run
        trace.append("down")

    await compare({}, [Contender("one", opened)], TINY)

    assert trace == ["up", *["run"] * (1 + TINY.rounds), "down"]


@pytest.mark.parametrize(
    ("measured", "holds", "word"),
    [(1.9, True, "holds"), (2.1, True, "within noise"), (2.2, False, "missed")],
)
def test_a_goal_holds_up_to_its_limit_and_a_twentieth(
    measured: float, holds: bool, word: str
) -> None:
    verdict = Verdict("as fast as light", measured, limit=2.0)

    assert (verdict.holds, verdict.word) == (holds, word)


def test_a_goal_for_nearly_nothing_has_less_slack() -> None:
    assert not Verdict("free", 1.1, limit=1.05, slack=FINE_SLACK).holds
    assert Verdict("free", 1.06, limit=1.05, slack=FINE_SLACK).holds


def test_results_read_back_are_what_was_written() -> None:
    spread = Spread(2.0, 1.5, 2.5)
    results = Results(
        {"python": "3.13"},
        [Verdict("fast", 1.0, 2.0), Verdict("faster", 1.0, 2.0, stretch=0.5)],
        [
            Figure({"loop": "trio", "handlers": 3}, "eventkit", "ns", spread, spread),
            Figure({"loop": "trio", "handlers": 3}, "peer", "ns", absent="not installed"),
        ],
    )

    assert Results.read(results.text()) == results


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123, "0.012"),
        (0.5, "0.50"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (2391.4, "2,391"),
    ],
)
def test_numbers_are_written_to_three_digits_or_so(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_has_its_numbers_on_the_right() -> None:
    assert table(["", "1"], [["floor", "2"]]) == "|  | 1 |\n| --- | ---: |\n| floor | 2 |"


def test_who_took_no_part_stands_under_the_table_with_the_reason() -> None:
    one = Spread(1, 1, 1)
    figures = [
        Figure({"n": 1}, "floor", "ns", one, one),
        Figure({"n": 3}, "floor", "ns", one, one),
        Figure({"n": 3}, "late", "ns", one, Spread(2.5, 2, 3)),
        *(Figure({"n": n}, name, "ns", absent="gone") for n in (1, 3) for name in ("a", "b")),
    ]

    assert grid(Results({}, [], figures), {}, "n") == (
        "|  | 1 | 3 |\n| --- | ---: | ---: |\n| floor | 1.00 | 1.00 |\n"
        "| late |  | 2.50 (2.00 to 3.00) |\n\nNot here: a, b: gone."
    )


def test_bars_are_as_long_as_their_values_and_ours_has_a_colour_of_its_own() -> None:
    bars = [Bar("eventkit", Spread(1, 1, 1), "1"), Bar("<peer>", Spread(2, 2, 4), "2")]

    drawn = drawing([Panel("Time & space", bars)])

    assert '<rect class="bar ours" x="250" y="33" width="100.0"' in drawn
    assert '<rect class="bar" x="250" y="55" width="200.0"' in drawn
    assert '<path class="range" d="M450.0 63H650.0"/>' in drawn
    assert "Time &amp; space" in drawn
    assert "&lt;peer&gt;" in drawn


def test_on_a_logarithmic_scale_the_same_factor_is_the_same_length() -> None:
    bars = [Bar("", Spread(value, value, value), "") for value in (1, 10, 100)]
    panel = Panel("", bars, logarithmic=True)

    assert panel.width(100) - panel.width(10) == pytest.approx(panel.width(10) - panel.width(1))
    assert panel.width(100) == 1


class Light:
    """A topic that measures nothing."""

    PACKAGES = ("pytest",)

    def __init__(self, *measured: float) -> None:
        self.measured = measured

    def measure(self, effort: Effort) -> Iterator[Comparison]:
        yield comparison_of(floor=[1, 1], eventkit=[2, 2])

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [Verdict("as fast as light", measured, limit=1) for measured in self.measured]

    def tables(self, results: Results) -> str:
        return "| light |"

    def plots(self, results: Results) -> dict[str, str]:
        return {"light.svg": "<svg/>"}


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Callable[[Light], None]:
    """Have that topic found instead of any other."""

    def take(found: Light) -> None:
        def topic(name: str) -> Light:
            return found

        monkeypatch.setattr("benchmarks.__main__.topic", topic)

    return take


@pytest.mark.parametrize(
    ("arguments", "measured", "code"),
    [
        (["--check"], (0.5, 1.05), 0),
        (["--check"], (0.5, 2), 1),
        ([], (0.5, 2), 0),
    ],
)
def test_a_missed_goal_fails_the_run_that_was_asked_to_check(
    arguments: list[str],
    measured: tuple[float, ...],
    code: int,
    light: Callable[[Light], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    light(Light(*measured))

    assert main(["publish", *arguments]) == code

    assert "holds" in capsys.readouterr().out


def test_results_are_kept_as_data_as_tables_and_drawn(
    light: Callable[[Light], None], tmp_path: Path
) -> None:
    light(Light(0.5))

    main(["publish", "--quick", "--out", str(tmp_path / "speed")])

    written = (tmp_path / "speed" / "publish.md").read_text()
    assert "\n| light |\n" in written
    assert "| as fast as light | 0.50 | 1.00 | holds |" in written
    assert Results.read((tmp_path / "speed" / "publish.json").read_text()).verdicts
    assert (tmp_path / "speed" / "light.svg").read_text() == "<svg/>"


def test_the_tables_say_how_busy_the_machine_was(
    light: Callable[[Light], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    light(Light())
    averages = iter([(0.25, 9.0, 9.0), (1.5, 9.0, 9.0)])
    monkeypatch.setattr("os.getloadavg", lambda: next(averages))

    written = page("publish", run("publish", SMALLEST))

    assert "load average 0.2 before and 1.5 after" in written


def test_what_was_measured_is_shown_anew_without_measuring(
    light: Callable[[Light], None], tmp_path: Path
) -> None:
    light(Light(0.5))
    main(["publish", "--quick", "--out", str(tmp_path)])
    measured = (tmp_path / "publish.json").read_text()
    (tmp_path / "publish.md").unlink()
    (tmp_path / "light.svg").unlink()

    light(Light(2))  # what it would find now
    assert main(["publish", "--redraw", "--check", "--out", str(tmp_path)]) == 0

    assert "| as fast as light | 0.50 |" in (tmp_path / "publish.md").read_text()
    assert (tmp_path / "light.svg").exists()
    assert (tmp_path / "publish.json").read_text() == measured


def test_nothing_can_be_shown_anew_from_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--redraw"])

    assert "--redraw needs --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", TOPICS)
def test_a_benchmark_runs_and_can_be_told_about(name: str, tmp_path: Path) -> None:
    results = run(name, SMALLEST)
    keep(name, results, tmp_path)
    if name == "bridge" and not any(figure.value for figure in results.figures):
        pytest.skip("no broker answers")

    assert any(f.value for f in results.figures if f.contender.startswith("eventkit"))
    assert Results.read((tmp_path / f"{name}.json").read_text()) == results
    assert "| eventkit" in page(name, results)


def test_an_unknown_benchmark_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])

    assert f"there is no speed; choose of {', '.join(TOPICS)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in TOPICS if (KEPT / f"{name}.json").exists()])
def test_the_tables_and_the_plots_show_what_was_measured(name: str) -> None:
    results = Results.read((KEPT / f"{name}.json").read_text())

    assert (KEPT / f"{name}.md").read_text() == page(name, results)
    for file, drawn in topic(name).plots(results).items():
        assert (KEPT / file).read_text() == drawn


def test_the_page_is_short_and_leads_to_every_table_and_every_plot() -> None:
    shown = KEPT.with_suffix(".md").read_text()

    for file in (*KEPT.glob("*.md"), *KEPT.glob("*.svg")):
        assert f"(benchmarks/{file.name})" in shown, file.name
    assert len(shown.splitlines()) <= 150


def test_the_page_that_says_why_says_what_was_measured() -> None:
    page = (KEPT.parent / "why.md").read_text()
    section = page.partition("\n## What it costs\n")[2].partition("\n## ")[0]
    measured = (KEPT / "served.md").read_text().splitlines()

    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]

    assert len(rows) == 4
    assert set(rows) <= {*measured}


TIMES: dict[str, list[float]] = {
    behind.BARE: [1000, 1000],
    behind.GROUP: [40_000, 20_000],
    behind.OURS: [44_000, 22_000],
}


def verdict_of(found: Comparison, module: ModuleType) -> Verdict:
    """The one verdict on a comparison."""
    (verdict,) = module.verdicts([found])
    assert isinstance(verdict, Verdict)
    return verdict


def test_what_runs_behind_the_response_is_held_against_an_anyio_group() -> None:
    found = Comparison({"loop": "uvloop", "request": "3 handlers, each waits 2 ms"}, TIMES)

    verdict = verdict_of(found, behind)

    assert (verdict.measured, verdict.limit, verdict.stretch) == (1.1, 1.2, 1.0)


def test_a_request_without_an_event_is_held_against_the_bare_app_in_microseconds() -> None:
    rounds: dict[str, list[float]] = {behind.BARE: [900, 1000], behind.OURS: [3400, 3500]}
    found = Comparison({"loop": "asyncio", "request": "no event"}, rounds)

    verdict = verdict_of(found, behind)

    assert (verdict.measured, verdict.limit, verdict.stretch) == (2.5, 3.0, 2.0)


def test_an_observer_is_held_against_a_bus_without_one_in_microseconds() -> None:
    rounds = TIMES | {behind.OBSERVED: [48_500.0, 26_500.0]}
    found = Comparison({"loop": "asyncio", "request": str(behind.Work(1))}, rounds)

    *_, verdict = behind.verdicts([found])

    assert (verdict.measured, verdict.limit, verdict.stretch) == (4.5, 5.0, 4.0)


@pytest.mark.parametrize(("handlers", "to"), [(3, served.GROUP), (1, served.PEER)])
def test_on_a_server_what_the_event_adds_is_held_against_what_another_adds(
    handlers: int, to: str
) -> None:
    rounds: dict[str, list[float]] = {
        served.PLAIN: [100, 200],
        to: [200, 300],
        served.OURS: [150, 250],
    }

    assert verdict_of(Comparison({"handlers": handlers}, rounds), served).measured == 0.5


def test_a_durable_transaction_is_held_against_the_bare_insert_by_the_wall_clock_alone() -> None:
    rounds: dict[str, list[float]] = {
        outbox.PLAIN: [100, 200],
        outbox.BARE: [120, 240],
        outbox.DURABLE: [126, 252],
    }
    cases = [
        Comparison(
            {"measured": outbox.TRANSACTION, "database": "one", "clock": clock, "rows": 3}, rounds
        )
        for clock in outbox.CLOCKS
    ]

    (verdict,) = outbox.verdicts(cases)

    assert (verdict.measured, verdict.limit) == (1.05, 1.1)


def test_a_relay_is_held_against_bare_statements_and_not_where_there_are_none() -> None:
    case: dict[str, str | int] = {"measured": outbox.BACKLOG, "database": "one"}
    rounds: dict[str, list[float]] = {outbox.RAW: [15, 15], outbox.RELAY: [60, 60]}

    (verdict,) = outbox.verdicts([Comparison(case, rounds), Comparison(case, {}, {"all": "away"})])

    assert verdict.measured == 4
    assert verdict.holds


def test_the_bridge_is_held_against_plain_faststream_by_the_wall_clock_alone() -> None:
    rounds: dict[str, list[float]] = {bridge.PLAIN: [100, 200], bridge.OURS: [150, 300]}
    cases = [
        Comparison({"measured": bridge.CONSUME, "broker": "NATS", "clock": clock}, rounds)
        for clock in (bridge.WALL, bridge.CPU)
    ]

    verdict = verdict_of(cases[0], bridge)

    assert (verdict.measured, verdict.limit, verdict.stretch) == (1.5, 2, 1 / 0.6)
    assert not [*bridge.verdicts(cases[1:])]


def test_what_the_bridge_adds_to_a_delay_is_held_in_milliseconds_where_the_broker_is_quick() -> (
    None
):
    rounds: dict[str, list[float]] = {bridge.PLAIN: [4e5, 5e5], bridge.OURS: [5e5, 7e5]}
    quick, slow = (
        Comparison({"measured": bridge.IDLE, "broker": name}, rounds) for name in ("NATS", "Kafka")
    )

    assert verdict_of(quick, bridge).measured == pytest.approx(0.15)
    assert not [*bridge.verdicts([slow])]


def test_a_broker_that_does_not_answer_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("faststream")
    monkeypatch.setenv("EVENTKIT_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setattr(bridge, "BROKERS", {"NATS": brokers.BROKERS["NATS"]})

    results = run("bridge", SMALLEST)

    assert "\n\nLeft out: NATS: none answers at 127.0.0.1:1; EVENTKIT_NATS_URL says where." in page(
        "bridge", results
    )


def test_a_drain_is_held_against_the_plain_loop_on_asyncio_alone() -> None:
    rounds: dict[str, list[float]] = {dispatch.FLOOR: [10], dispatch.DRAIN: [120]}
    cases = [
        Comparison({"loop": loop, "waiting": dispatch.NONE, "handlers": 10}, rounds)
        for loop in ("uvloop", "trio")
    ]

    (verdict,) = dispatch.verdicts(cases)

    assert (verdict.measured, verdict.limit, verdict.stretch) == (12, 13, 10)


@pytest.mark.anyio
async def test_a_row_of_requests_is_over_when_its_handlers_have_ended() -> None:
    rows: list[int] = []
    handlers, latch = behind.handlers_of(behind.Work(3))
    async with create_task_group() as tasks:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            rows.append(latch.missing)
            for handler in handlers:
                tasks.start_soon(handler, None)

        await behind.called(app, latch)(2 * behind.ROW)

        assert latch.missing == 0
        assert rows == [3 * behind.ROW] * 2 * behind.ROW
