"""The methods and DataModules of the domain: `__init__.pyi` lists them (generated from the catalogue)."""

from zoo.core.faces import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
