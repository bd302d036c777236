"""Layers, losses and metrics that two families use."""
