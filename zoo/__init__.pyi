from .core import Trainer as Trainer
from .core import ZooDataModule as ZooDataModule
from .core import ZooError as ZooError
from .core import ZooModule as ZooModule
from .core import load as load
