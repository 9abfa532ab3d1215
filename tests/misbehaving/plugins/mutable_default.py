from stillhouse.api import LossTerm, Method, MethodConfig, hookimpl


class Config(MethodConfig):
    """Its list is shared by every run of the process."""

    weights: list[float] = [1.0, 2.0]


class Mine(Method):
    """Has a default that anyone may change."""

    api_version = 1
    Config = Config

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}
