"""Image restoration: deraining."""
