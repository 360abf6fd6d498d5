"""The tests: ``unit`` on pure functions, ``upstream`` through NxDI, ``cli`` on the commands."""
