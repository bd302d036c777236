"""Another package's method, as a third party would write one; `tests/conftest.py` registers it."""
