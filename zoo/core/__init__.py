"""The base: module, data module, catalogue, hub, trainer, recipe. Everything else stands on this and nothing else."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
