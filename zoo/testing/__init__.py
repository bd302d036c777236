"""What a method's tests need, also for methods that live outside this library: a Hugging Face Hub on loopback.

``from zoo.testing import LoopbackHub`` imports neither torch nor huggingface_hub, so that it can set the environment
before the client reads it.
"""

from zoo.testing.hub import LoopbackHub

__all__ = ["LoopbackHub"]
