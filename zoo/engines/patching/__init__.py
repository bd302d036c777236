"""Finding and changing parts of causal language models of transformers: sites, patches, sweeps, weights."""

from zoo.engines.patching.anatomy import FAMILIES, KINDS, Anatomy, Family, Site, Slice, same_shape
from zoo.engines.patching.module import CausalLMModule
from zoo.engines.patching.runs import at, capture, evaluating, inputs_of, patched
from zoo.engines.patching.sweeps import activation_sweep, logit_difference, path_sweep, probability, receiver_sweep, run
from zoo.engines.patching.weights import Deltas, swapped, weights_of

__all__ = [
    "FAMILIES",
    "KINDS",
    "Anatomy",
    "CausalLMModule",
    "Deltas",
    "Family",
    "Site",
    "Slice",
    "activation_sweep",
    "at",
    "capture",
    "evaluating",
    "inputs_of",
    "logit_difference",
    "patched",
    "path_sweep",
    "probability",
    "receiver_sweep",
    "run",
    "same_shape",
    "swapped",
    "weights_of",
]
