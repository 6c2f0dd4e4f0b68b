"""Owns how an event is called and written outside of its process. Knows nothing of SQL or brokers.

An event is written as JSON, and read back as it was: equal, and of the same types. What cannot be
is refused, when the class is looked at or when the value is written, and never changed in silence.
Pydantic and msgspec are imported when the first class needs them.
"""

from eventkit.wire._cloudevents import Received, Wired, decode, encode
from eventkit.wire._codec import Codec, EventDecodingError, codec_for
from eventkit.wire._names import Upcast, is_named, named, names_of, wire_name

__all__ = [
    "Codec",
    "EventDecodingError",
    "Received",
    "Upcast",
    "Wired",
    "codec_for",
    "decode",
    "encode",
    "is_named",
    "named",
    "names_of",
    "wire_name",
]
