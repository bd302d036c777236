"""Graphs whose nodes and edges have types: meta-structures, their search, and node classes or scores from them."""
