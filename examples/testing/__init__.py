"""How to test code that publishes events, one situation in each file; run them with pytest.

`signup.py` is the application. Its tests need `eventkit`, `pytest` and what they import; there is
nothing to configure but the fixture `event_bus` in `conftest.py`.

    pytest examples/testing
"""
