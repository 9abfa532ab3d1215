from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Remembers every loss with all that it was made from."""

    api_version = 1

    def __init__(self, config=None):
        super().__init__(config)
        self.history = []

    @hookimpl
    def loss_terms(self, student_out, batch, info):
        loss = info.mean(student_out.logits.square().mean(-1), batch.mask)
        self.history.append(loss)
        return {"mine": LossTerm(loss)}
