from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Makes the teacher a little better at every step."""

    api_version = 1

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}

    @hookimpl
    def on_run_start(self, run):
        self.teacher = run.teacher

    @hookimpl
    def on_update_end(self, info):
        for parameter in self.teacher.parameters():
            parameter.data.mul_(0.99)
