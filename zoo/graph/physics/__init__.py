"""Physics on graphs."""
