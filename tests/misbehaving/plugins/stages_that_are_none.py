from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Gives a number of stages in place of stages."""

    api_version = 1

    @hookimpl
    def stages(self, run):
        return 3

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}
