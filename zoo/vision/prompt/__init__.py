"""Prompt learning for vision-language models."""
