from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Divides zero by zero."""

    api_version = 1

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(student_out.logits.sum() * float("nan"))}
