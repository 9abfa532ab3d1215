"""Templates of plugin packages, and the way from one of them to a folder."""

from stillhouse.scaffold.write import KINDS, Names, write

__all__ = ["KINDS", "Names", "write"]
