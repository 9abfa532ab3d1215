"""Every loss of the package ``torchdistill`` (extra ``torchdistill``) as a method, by name and arguments."""

from stillhouse_torchdistill.method import Torchdistill, TorchdistillConfig

__all__ = ["Torchdistill", "TorchdistillConfig"]
