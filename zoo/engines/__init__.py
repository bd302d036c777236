"""Machinery that several families use."""
