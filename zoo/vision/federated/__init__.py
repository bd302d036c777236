"""Federated image classification: methods that train on pictures which stay where they are."""
