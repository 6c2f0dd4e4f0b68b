"""Owns the name and the JSON of an event outside of its process. Knows nothing of SQL or brokers.

An event is read back as it was written: equal, and of the same types. A class or a value for which
this is not possible is refused, when the class is looked at or when the value is written. Nothing
is changed silently. Pydantic and msgspec are imported when the first class needs them.
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
