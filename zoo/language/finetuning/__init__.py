"""Methods that fine-tune pretrained language models."""
