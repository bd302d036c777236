"""Skeletons: joints that move, as graphs over time."""
