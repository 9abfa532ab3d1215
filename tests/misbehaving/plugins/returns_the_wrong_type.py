from stillhouse.api import Method, hookimpl


class Mine(Method):
    """Gives a tensor in place of named terms."""

    api_version = 1

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return student_out.logits.mean()
