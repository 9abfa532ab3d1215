from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Says what it requires in a word, where a set of words is expected."""

    api_version = 1
    requires = "logits"

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}
