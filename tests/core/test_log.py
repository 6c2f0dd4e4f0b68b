"""What reaches the log, whatever has configured it: no silent failure, and lines in groups."""

import ast
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from textwrap import dedent
from typing import Annotated, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import Depends

from eventkit import DispatchError, EventBus
from eventkit._core.log import log

PACKAGE = Path(__file__).parent.parent.parent / "eventkit"


def output_of(configuring: str) -> str:
    """What a program writes that has imported eventkit, configures its logs, and has a failure."""
    program = """
        import logging, logging.config, anyio
        from eventkit import EventBus

        {configuring}

        async def main() -> None:
            async with bus.context():
                bus.publish("an event")

        bus = EventBus()

        @bus.on(str, name="mail")
        async def mail(event: str) -> None:
            raise ValueError("no mail today")

        anyio.run(main)
        configure()
        anyio.run(main)
    """
    text = dedent(program).format(configuring=dedent(configuring).strip())
    ended = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=60
    )
    return ended.stdout


TO_STDOUT = """
    SETTINGS = {
        "version": 1,
        "formatters": {"plain": {"format": "%(levelname)s [%(name)s] %(message)s"}},
        "handlers": {
            "out": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stdout",
                "formatter": "plain",
            }
        },
        "root": {"handlers": ["out"]},
    }
"""


@pytest.mark.parametrize(
    "configuring",
    [
        "def configure():\n    logging.config.dictConfig(SETTINGS)",
        """
        INI = '''
        [loggers]
        keys=root
        [handlers]
        keys=out
        [formatters]
        keys=plain
        [logger_root]
        handlers=out
        [handler_out]
        class=StreamHandler
        args=(sys.stdout,)
        formatter=plain
        [formatter_plain]
        format=%(levelname)s [%(name)s] %(message)s
        '''
        def configure():
            import io, textwrap
            logging.config.fileConfig(io.StringIO(textwrap.dedent(INI)))
        """,
        """
        import structlog
        def configure():
            structlog.configure(
                processors=[
                    structlog.stdlib.filter_by_level,
                    structlog.stdlib.render_to_log_kwargs,
                ],
                wrapper_class=structlog.stdlib.BoundLogger,
                logger_factory=structlog.stdlib.LoggerFactory(),
            )
            logging.config.dictConfig(SETTINGS)
        """,
    ],
    ids=["dictConfig", "fileConfig", "structlog"],
)
def test_a_configuration_that_disables_existing_loggers_silences_no_failure(
    configuring: str,
) -> None:
    output = output_of(dedent(TO_STDOUT) + dedent(configuring))

    assert output.count("ERROR [eventkit] event handler failed") == 1
    assert "ValueError: no mail today" in output


@pytest.fixture
def logger() -> Generator[logging.Logger]:
    logger = logging.getLogger("eventkit")
    yield logger
    logger.setLevel(logging.NOTSET)
    logger.disabled = False


def test_a_level_of_the_users_own_silences_the_log(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    logger.setLevel(logging.CRITICAL)
    logger.disabled = True
    log(logging.ERROR, "lost", bus="shop")
    assert caplog.messages == []

    log(logging.CRITICAL, "lost", bus="shop")
    assert caplog.messages == ["lost: bus=shop"]


def test_a_filter_of_the_users_own_silences_the_log(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(refuse)
    logger.disabled = True
    try:
        log(logging.ERROR, "lost", bus="shop")
    finally:
        logger.removeFilter(refuse)
    log(logging.ERROR, "found", bus="shop")

    assert caplog.messages == ["found: bus=shop"]


def test_what_is_disabled_for_all_loggers_stays_disabled(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.ERROR)
    try:
        log(logging.ERROR, "lost", bus="shop")
    finally:
        logging.disable(logging.NOTSET)

    assert caplog.messages == []


def test_lines_of_one_kind_share_their_template_and_those_of_others_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus(name="shop")

    async def fail(event: str) -> None:
        raise ValueError("no mail today")

    bus.subscribe(str, fail, name="mail")

    async def main() -> None:
        async with bus.context() as unit:
            bus.publish("one", "two")
            await unit.drain()
            bus.publish("three")
            unit.discard()

    caplog.set_level(logging.INFO, "eventkit")
    anyio.run(main)

    failed = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert {record.msg for record in failed} == {
        "event handler failed: event_type=%(event_type)s handler=%(handler)s "
        "delivery_id=%(delivery_id)s"
    }
    assert len({record.getMessage() for record in failed}) == len(failed)
    assert all(vars(record)["eventkit"] == record.args for record in failed)
    (discarded,) = [record for record in caplog.records if record.levelno == logging.INFO]
    assert discarded.msg == (
        "deliveries discarded: bus=%(bus)s deliveries=%(deliveries)s event_types=%(event_types)s"
    )


def test_a_line_may_have_percent_signs_and_no_facts(caplog: pytest.LogCaptureFixture) -> None:
    log(logging.ERROR, "100% lost", bus="100%", reason="%(bus)s")
    log(logging.ERROR, "100% found")

    assert caplog.messages == ["100% lost: bus=100% reason=%(bus)s", "100% found"]


class Paid:
    """An event whose payload no frame of ours may show."""

    def __repr__(self) -> str:
        return "the payload"


def failing_at_once(bus: EventBus) -> None:
    async def fail(event: Paid) -> None:
        raise ValueError("declined")

    bus.subscribe(Paid, fail)


def failing_later(bus: EventBus) -> None:
    async def fail(event: Paid) -> None:
        await checkpoint()
        raise ValueError("declined")

    bus.subscribe(Paid, fail)


def failing_within_a_limit(bus: EventBus) -> None:
    async def fail(event: Paid) -> None:
        await checkpoint()
        raise ValueError("declined")

    bus.subscribe(Paid, fail, timeout=60)


def failing_in_a_thread(bus: EventBus) -> None:
    def fail(event: Paid) -> None:
        raise ValueError("declined")

    bus.subscribe(Paid, fail)


def failing_in_its_call(bus: EventBus) -> None:
    def fail(event: Paid) -> None:
        raise ValueError("declined")

    bus.subscribe(Paid, fail, thread=False)


async def one() -> int:
    return 1


def failing_with_a_dependency(bus: EventBus) -> None:
    async def fail(event: Paid, number: Annotated[int, Depends(one)]) -> None:
        raise ValueError("declined")

    bus.subscribe(Paid, fail)


def failing_with_a_dependency_in_a_thread(bus: EventBus) -> None:
    def fail(event: Paid, number: Annotated[int, Depends(one)]) -> None:
        raise ValueError("declined")

    bus.subscribe(Paid, fail)


def shown_of_ours(error: BaseException | None) -> list[str]:
    """Where a traceback with local variables, in frames of ours, shows the payload."""
    found: list[str] = []
    for frame, _ in traceback.walk_tb(error.__traceback__ if error else None):
        if frame.f_code.co_filename.startswith(str(PACKAGE)):
            found += [
                f"{frame.f_code.co_qualname}: {name}"
                for name, value in frame.f_locals.items()
                if "the payload" in repr(value)
            ]
    if isinstance(error, BaseExceptionGroup):
        for each in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            found += shown_of_ours(each)
    return found


@pytest.mark.parametrize(
    "subscribe",
    [
        failing_at_once,
        failing_later,
        failing_within_a_limit,
        failing_in_a_thread,
        failing_in_its_call,
        failing_with_a_dependency,
        failing_with_a_dependency_in_a_thread,
    ],
)
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.anyio
async def test_no_frame_of_ours_shows_the_payload_of_what_failed(
    subscribe: Callable[[EventBus], None], debug: bool
) -> None:
    bus = EventBus(debug=debug)
    subscribe(bus)
    async with bus.context() as unit:
        bus.publish(Paid())
        (failure,) = (await unit.drain()).failures
    with pytest.raises(DispatchError) as raised:
        await bus.dispatch(Paid())

    assert any(frame.name == "fail" for frame in traceback.extract_tb(failure.error.__traceback__))
    assert shown_of_ours(failure.error) == []
    assert shown_of_ours(raised.value) == []


def test_no_fact_is_called_as_a_record_of_the_standard_library_calls_its_own() -> None:
    """structlog makes attributes of a record of them, and the standard library refuses those."""
    reserved = {*vars(logging.makeLogRecord({})), "message", "asctime", "event"}
    facts = set[str]()
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("log"):
                facts |= {keyword.arg for keyword in node.keywords if keyword.arg}

    assert {"event_type", "handlers", "observer"} <= facts
    assert not facts - {"exc_info"} & reserved
