import functools

from stillhouse.api import Method, hookimpl


@hookimpl
def _terms(self, student_out, step, weight):
    return {}


class Mine(Method):
    """Implements a hook with an object that pluggy ignores."""

    api_version = 1

    loss_terms = functools.partial(_terms, weight=2.0)
