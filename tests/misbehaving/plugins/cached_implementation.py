import functools

from stillhouse.api import Method, hookimpl


class Mine(Method):
    """Implements a hook with a wrapper that pluggy ignores."""

    api_version = 1

    @functools.lru_cache
    @hookimpl
    def loss_terms(self, student_out, info):
        return {}
