"""What a callable is as a handler: its name, its place, where it starts, and what is refused."""

import functools
import gc
import inspect
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, cast
from unittest.mock import AsyncMock, MagicMock, Mock, call, create_autospec

import pytest

from eventkit import EventBus, InvalidHandlerError
from eventkit._core.handlers import Handler, inspect_handler, is_duration, name_of


def looked_at(
    function: Callable[..., object],
    *,
    name: str | None = None,
    timeout: float | None | EllipsisType = ...,
    thread: bool | None = None,
) -> Handler:
    return inspect_handler(function, name=name, timeout=timeout, thread=thread)


def refusal(function: Callable[..., object], **options: Any) -> str:  # options of all types
    with pytest.raises(InvalidHandlerError) as caught:
        looked_at(function, **options)
    return str(caught.value)


def place(function: Callable[..., object]) -> str:
    return f"{__file__}:{inspect.unwrap(function).__code__.co_firstlineno}"


async def on_loop(event: object) -> None: ...


def plain(event: object) -> None: ...


@functools.wraps(on_loop)
def wrapping(event: object) -> Awaitable[None]:
    return on_loop(event)


@functools.wraps(plain)
async def wrapping_a_plain_one(event: object) -> None:
    plain(event)


class Handlers:
    async def on_loop(self, event: object) -> None: ...

    def plain(self, event: object) -> None: ...

    @classmethod
    async def of_class(cls, event: object) -> None: ...

    @staticmethod
    async def static(event: object) -> None: ...

    async def second(self, first: int, event: object) -> None: ...


class Callable_:  # noqa: N801 - its name stands in assertions
    async def __call__(self, event: object) -> None: ...


class PlainCallable:
    def __call__(self, event: object) -> None: ...


class Decorating:
    """A decorator written as a class."""

    def __init__(self, function: Callable[[object], object]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, event: object) -> object:
        return self.function(event)


HERE = f"{__name__}:"
handlers = Handlers()

LOOKS: list[tuple[Callable[..., object], str, Callable[..., object], bool]] = [
    (on_loop, "on_loop", on_loop, False),
    (plain, "plain", plain, True),
    (wrapping, "on_loop", on_loop, False),
    (wrapping_a_plain_one, "plain", plain, False),
    (handlers.on_loop, "Handlers.on_loop", Handlers.on_loop, False),
    (handlers.plain, "Handlers.plain", Handlers.plain, True),
    (Handlers.of_class, "Handlers.of_class", vars(Handlers)["of_class"].__func__, False),
    (Handlers.static, "Handlers.static", Handlers.static, False),
    (functools.partial(handlers.second, 1), "Handlers.second", Handlers.second, False),
    (functools.partial(functools.partial(plain)), "plain", plain, True),
    (Callable_(), "Callable_", Callable_.__call__, False),
    (PlainCallable(), "PlainCallable", PlainCallable.__call__, True),
    (functools.partial(Callable_()), "Callable_", Callable_.__call__, False),
    (Decorating(on_loop), "on_loop", on_loop, False),
    (Decorating(plain), "plain", plain, True),
    (functools.lru_cache(on_loop), "on_loop", on_loop, False),
]


@pytest.mark.parametrize(
    ("function", "name", "defined", "thread"),
    LOOKS,
    ids=[f"{look[1]}-{i}" for i, look in enumerate(LOOKS)],
)
def test_a_handler_has_the_name_place_and_start_of_what_is_called(
    function: Callable[..., object], name: str, defined: Callable[..., object], thread: bool
) -> None:
    handler = looked_at(function)

    assert handler.function is function
    assert handler.name == HERE + name
    assert handler.location == f"{__file__}:{defined.__code__.co_firstlineno}"
    assert handler.in_thread is thread


def test_a_lambda_and_an_inner_function_are_named_with_their_surroundings() -> None:
    def inner(event: object) -> None: ...

    nameless: Callable[[object], None] = lambda event: None  # noqa: E731 - the point
    test = test_a_lambda_and_an_inner_function_are_named_with_their_surroundings.__name__

    assert looked_at(inner).name == f"{HERE}{test}.<locals>.inner"
    assert looked_at(nameless).name == f"{HERE}{test}.<locals>.<lambda>"


def test_an_explicit_name_goes_before_the_own_one() -> None:
    assert looked_at(on_loop, name="mailer").name == "mailer"


@pytest.mark.parametrize("thread", [True, False])
def test_where_a_plain_function_starts_may_be_chosen(thread: bool) -> None:
    assert looked_at(plain, thread=thread).in_thread is thread


def test_a_plain_function_around_an_async_one_may_be_sent_to_a_thread() -> None:
    # It may well run the other one on a loop of its own, and block until that has ended.
    assert looked_at(wrapping, thread=True).in_thread
    assert looked_at(Decorating(on_loop), thread=True).in_thread


# Refusals


@pytest.mark.parametrize("thing", [None, 5, "send_mail"])
def test_what_cannot_be_called_is_refused(thing: Any) -> None:  # the misuse in question
    assert refusal(thing) == f"a handler is a callable that takes the event, not {thing!r}"


def test_a_class_is_refused() -> None:
    assert refusal(Handlers) == (
        f"{HERE}Handlers is a class: an event would only create an instance of it. Subscribe an "
        "instance with __call__, or a method of an instance"
    )


def generator(event: object) -> Generator[int]:
    yield 1


async def async_generator(event: object) -> AsyncGenerator[int]:
    yield 1


@functools.wraps(generator)
def wrapping_a_generator(event: object) -> object:
    return generator(event)


class CallableGenerator:
    def __call__(self, event: object) -> Generator[int]:
        yield 1


@pytest.mark.parametrize(
    ("function", "name", "defined"),
    [
        (generator, "generator", generator),
        (async_generator, "async_generator", async_generator),
        (functools.partial(generator), "generator", generator),
        (wrapping_a_generator, "generator", generator),
        (CallableGenerator(), "CallableGenerator", CallableGenerator.__call__),
        (CallableGenerator().__call__, "CallableGenerator.__call__", CallableGenerator.__call__),
    ],
)
def test_a_generator_function_is_refused(
    function: Callable[..., object], name: str, defined: Callable[..., object]
) -> None:
    assert refusal(function) == (
        f"{HERE}{name} ({place(defined)}) is a generator function: calling it runs none of its "
        "body. Remove the yield"
    )


def takes_nothing() -> None: ...


def only_keywords(*, event: object) -> None: ...


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (takes_nothing, "() -> None"),
        (only_keywords, "(*, event: object) -> None"),
    ],
)
def test_a_signature_that_does_not_take_an_event_is_refused(
    function: Callable[..., object], signature: str
) -> None:
    assert refusal(function) == (
        f"{HERE}{function.__qualname__} ({place(function)}) cannot be called with an event: "
        f"its signature is {signature}. It needs a positional parameter for the event"
    )


def test_a_method_without_its_instance_is_told_so() -> None:
    assert refusal(Handlers.plain).endswith(
        "its signature is (self, event: object) -> None. It is a method of a class: subscribe the "
        "method of an instance"
    )


def test_a_coroutine_instead_of_its_function_is_told_so() -> None:
    async def handler(event: object) -> None: ...

    called = handler("event")
    assert refusal(cast("Any", called)).endswith(". Pass the function without calling it")
    called.close()


def test_a_signature_with_defaults_and_stars_is_taken() -> None:
    def defaults(event: object = None, other: int = 1, *, third: int = 2) -> None: ...

    def stars(*args: object, **kwargs: object) -> None: ...

    for function in (defaults, stars):
        assert looked_at(function).in_thread


def test_annotations_need_not_be_importable_at_run_time() -> None:
    future = "" if sys.version_info >= (3, 14) else "from __future__ import annotations\n"
    source = f"{future}async def handler(event: OnlyForTypeCheckers) -> None: ..."
    namespace: dict[str, Any] = {"__name__": "somewhere"}  # as exec fills it
    exec(compile(source, "somewhere.py", "exec", dont_inherit=True), namespace)

    handler = looked_at(namespace["handler"])

    assert (handler.name, handler.location) == (
        "somewhere:handler",
        "somewhere.py:" + str(1 + bool(future)),
    )


def test_a_name_that_was_given_stays_when_the_function_is_renamed() -> None:
    def function(event: object) -> None: ...

    handler = looked_at(function)
    before = handler.name
    function.__qualname__, function.__module__ = "another", "elsewhere"

    assert handler.name == before
    assert looked_at(function).name == "elsewhere:another"


def test_a_function_of_the_event_alone_is_left_without_what_it_did_not_have() -> None:
    def function(event: object) -> None: ...

    before = [*map(type, gc.get_referents(function))]
    EventBus().subscribe(object, function)

    assert [*map(type, gc.get_referents(function))] == before


def test_a_function_is_called_as_its_given_signature_says() -> None:
    def function(event: object) -> None: ...

    given = inspect.Signature([inspect.Parameter("event", inspect.Parameter.KEYWORD_ONLY)])
    function.__signature__ = given  # type: ignore[attr-defined]

    assert refusal(function) == (
        f"{name_of(function)} ({place(function)}) cannot be "
        f"called with an event: its signature is {given}. It needs a positional parameter for the "
        "event"
    )


@pytest.mark.parametrize(
    "function", [on_loop, handlers.on_loop, Callable_(), functools.partial(on_loop)]
)
def test_an_async_function_is_refused_a_thread(function: Callable[..., object]) -> None:
    message = refusal(function, thread=True, name="mailer")

    assert message.startswith("mailer (")
    assert message.endswith(") is async and runs on the event loop: remove thread=True")


def test_a_timeout_in_a_thread_is_refused() -> None:
    assert refusal(plain, timeout=5) == (
        f"{HERE}plain ({place(plain)}) runs in a worker thread, which cannot be stopped: remove "
        "timeout=, or make the handler an async def"
    )
    assert looked_at(plain, timeout=None).timeout is None
    assert looked_at(plain, timeout=5, thread=False).timeout == 5


NO_DURATIONS: list[object] = [0, -1, 0.0, float("nan"), float("-inf"), True, "5", [], object]


@pytest.mark.parametrize("timeout", NO_DURATIONS, ids=repr)
def test_a_timeout_that_is_no_time_is_refused(timeout: Any) -> None:  # the misuse in question
    assert not is_duration(timeout)
    assert refusal(on_loop, timeout=timeout) == (
        f"{HERE}on_loop ({place(on_loop)}): timeout= takes seconds above 0, not {timeout!r}"
    )


@pytest.mark.parametrize("timeout", [1, 0.5, float("inf"), None, ...], ids=repr)
def test_a_timeout_is_kept_as_given(timeout: float | None | EllipsisType) -> None:
    assert looked_at(on_loop, timeout=timeout).timeout == timeout


# Identity


def test_a_method_is_the_same_handler_on_every_access() -> None:
    seen: list[object] = []
    other: list[object] = []

    assert looked_at(handlers.plain).identity == looked_at(handlers.plain).identity
    assert looked_at(handlers.plain).identity != looked_at(Handlers().plain).identity
    assert looked_at(seen.append).identity == looked_at(seen.append).identity
    assert looked_at(seen.append).identity != looked_at(other.append).identity
    assert looked_at(plain).identity == looked_at(plain).identity
    assert looked_at(plain).identity != looked_at(functools.partial(plain)).identity


def test_equal_but_different_objects_are_different_handlers() -> None:
    @dataclass
    class Notify:
        """Equal by value, and without a hash."""

        address: str

        def __call__(self, event: object) -> None: ...

    one, other = Notify("a"), Notify("a")

    assert looked_at(one).identity != looked_at(other).identity
    assert looked_at(one.__call__).identity != looked_at(other.__call__).identity


# Odd callables


class Answering:
    """Has every attribute one may ask for, as some proxies do."""

    def __getattr__(self, name: str) -> "Answering":
        return Answering()

    async def __call__(self, event: object) -> None: ...


class WrappingItself:
    def __init__(self) -> None:
        self.__wrapped__ = self

    def __call__(self, event: object) -> None: ...


class WrappingNothing:
    __wrapped__ = "the text it came from"

    def __call__(self, event: object) -> None: ...


def wrapping_itself(event: object) -> None: ...


wrapping_itself.__wrapped__ = wrapping_itself  # type: ignore[attr-defined]


class WithoutSignature:
    __signature__ = "nonsense"

    def __call__(self, event: object) -> None: ...


class Looking:
    """A function of a compiled module: looks like one, and is none."""

    __name__ = "compiled"
    __qualname__ = "compiled"
    __module__ = "native"
    __code__ = on_loop.__code__
    __defaults__ = None
    __kwdefaults__ = None

    def __call__(self, event: object) -> Awaitable[None]:
        return on_loop(event)


BUILT_IN_LIST: list[object] = []
BUILT_IN_DICT: dict[object, object] = {}


async def specification(event: object) -> None: ...


# Older Pythons do not see that such a mock is async; its result is awaited all the same.
SPEC_IS_PLAIN = not inspect.iscoroutinefunction(create_autospec(specification))


ODD: dict[str, tuple[Callable[..., object], str, bool]] = {
    "answers everything": (Answering(), f"{HERE}Answering", False),
    "object wrapping itself": (WrappingItself(), f"{HERE}WrappingItself", True),
    "object wrapping nothing": (WrappingNothing(), f"{HERE}WrappingNothing", True),
    "function wrapping itself": (wrapping_itself, f"{HERE}wrapping_itself", True),
    "without signature": (WithoutSignature(), f"{HERE}WithoutSignature", True),
    "compiled": (Looking(), "native:compiled", False),
    "Mock": (Mock(), "unittest.mock:Mock", True),
    "MagicMock": (MagicMock(), "unittest.mock:MagicMock", True),
    "AsyncMock": (AsyncMock(), "unittest.mock:AsyncMock", False),
    "autospec": (create_autospec(specification), "builtins:specification", SPEC_IS_PLAIN),
    "mock.call": (call, "unittest.mock:_Call", True),
    "method of a list": (BUILT_IN_LIST.append, "builtins:list.append", True),
    "method of a type": (str.upper, "builtins:str.upper", True),
    "built-in function": (print, "builtins:print", True),
    "built-in without signature": (BUILT_IN_DICT.update, "builtins:dict.update", True),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_callables_are_taken_as_they_are(odd: str) -> None:
    function, name, thread = ODD[odd]

    handler = looked_at(function)

    assert (handler.name, handler.in_thread) == (name, thread)
    assert handler.location == "built in" or handler.location.rpartition(":")[2].isdigit()


def test_an_odd_callable_can_be_subscribed_and_described() -> None:
    bus = EventBus()
    for function, _, _ in ODD.values():
        bus.subscribe(object, function)

    assert len(bus.describe()) == len(ODD)
