"""Federated learning: many clients train together without handing over their data.

`FederatedModule` is one round of communication a training step; `Clients` trains many copies of a network at once;
the rest are small functions: who takes part (`schedule`), what the server does (`aggregation`, `algorithms`), what
lives on with a client (`state`), random views (`views`), and `remote` and `flower`, which run the same module on many
machines.
"""

from zoo.engines.federated.aggregation import Message, average, full_precision, gather, mix, nbytes
from zoo.engines.federated.clients import Clients, clip, masked_mean
from zoo.engines.federated.module import FederatedModule, Samples, pixels
from zoo.engines.federated.schedule import local_batches, sample_clients
from zoo.engines.federated.state import ClientStates
from zoo.engines.federated.views import Views

__all__ = [
    "ClientStates", "Clients", "FederatedModule", "Message", "Samples", "Views", "average", "clip", "full_precision",
    "gather", "local_batches", "masked_mean", "mix", "nbytes", "pixels", "sample_clients",
]  # fmt: skip
