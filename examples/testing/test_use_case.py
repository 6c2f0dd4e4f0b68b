"""A use case alone: no HTTP, no bus, no event loop; a recorder is somebody to tell."""

import pytest

from eventkit.testing import EventRecorder
from examples.testing.signup import AlreadySignedUp, SignedUp, SignUp


def test_signing_up_says_so() -> None:
    events = EventRecorder()

    SignUp(events, members=set()).execute("ada@example.org")

    assert events.published == [SignedUp("ada@example.org")]


def test_signing_up_twice_is_refused_in_silence() -> None:
    events = EventRecorder()

    with pytest.raises(AlreadySignedUp):
        SignUp(events, members={"ada@example.org"}).execute("ada@example.org")

    events.none(SignedUp)
