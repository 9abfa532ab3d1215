from stillhouse.api import Method, hookimpl


class Mine(Method):
    """Asks for an argument that the hook does not have."""

    api_version = 1

    @hookimpl
    def loss_terms(self, student_logits, targets, info):
        return {}
