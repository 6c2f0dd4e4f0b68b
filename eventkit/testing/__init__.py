"""What tests of event-driven code need, for whichever test runner: no pytest inside."""
