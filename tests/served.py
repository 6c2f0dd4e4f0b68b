"""The app that the tests of real servers talk to; its handler waits for what the client says."""

from collections import defaultdict
from dataclasses import dataclass, field

from anyio import Event, fail_after
from fastapi import FastAPI

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.serving import PATIENCE


@dataclass(frozen=True, slots=True)
class Published:
    name: str


@dataclass(slots=True)
class Story:
    """What became of one event, and where it stands."""

    lines: list[str] = field(default_factory=list[str])
    begun: Event = field(default_factory=Event)
    received: Event = field(default_factory=Event)
    ended: Event = field(default_factory=Event)


bus = EventBus()
stories: defaultdict[str, Story] = defaultdict(Story)
app = FastAPI()
app.add_middleware(EventContextMiddleware, bus=bus)


@bus.on(Published)
async def handle(event: Published) -> None:
    """Fail, or wait until the client says that it has the response."""
    story = stories[event.name]
    try:
        if event.name == "failing":
            story.lines.append("handler fails")
            raise RuntimeError("no mail today")
        story.lines.append("handler waits for the client")
        story.begun.set()
        await story.received.wait()
        story.lines.append("handler ends")
    finally:
        story.ended.set()


@app.post("/publish/{name}")
async def publish(name: str) -> str:
    """Publish an event."""
    bus.publish(Published(name))
    return "published"


@app.post("/got-it/{name}")
async def got_it(name: str) -> str:
    """Once the handler is waiting, tell it that the client has the response."""
    story = stories[name]
    with fail_after(PATIENCE):
        await story.begun.wait()
    story.lines.append("client has the response")
    story.received.set()
    return "told"


@app.get("/story/{name}")
async def story_of(name: str) -> list[str]:
    """Once the handler has ended, tell what happened."""
    story = stories[name]
    with fail_after(PATIENCE):
        await story.ended.wait()
    return story.lines
