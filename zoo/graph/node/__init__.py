"""Methods for the nodes of one graph."""
