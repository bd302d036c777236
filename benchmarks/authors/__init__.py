"""One file a method: the authors' code, at a path the caller gives, run beside ours on the same weights and inputs.

Each file has ``compare(checkout) -> {figure: largest relative difference}``, ``golden(checkout) -> tensors`` and
``speed(checkout, device) -> {what: {"ours_ms": ..., "authors_ms": ..., ...}}``.
"""
