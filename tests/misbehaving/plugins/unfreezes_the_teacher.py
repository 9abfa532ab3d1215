from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Lets the teacher have gradients."""

    api_version = 1

    @hookimpl
    def on_run_start(self, run):
        run.teacher.requires_grad_(True)

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}
