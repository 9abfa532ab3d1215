from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Has the teacher drop units out."""

    api_version = 1

    @hookimpl
    def on_stage_start(self, run):
        run.teacher.train()

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}
