"""Another package's method, as a third party would write one; `tests/hub/conftest.py` registers it."""
