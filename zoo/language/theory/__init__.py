"""Methods that study how attention learns, on problems small enough to be solved exactly."""
