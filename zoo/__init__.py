"""A zoo of papers' methods: import in one line, fine-tune with one Trainer, publish to the Hub, prove by one command.

``import zoo`` loads neither torch nor lightning; the attributes below load on first use.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
