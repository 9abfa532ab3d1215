import stillhouse.plugin.catalog

stillhouse.plugin.catalog.time.sleep(60)

from stillhouse.api import LossTerm, Method, hookimpl


class Mine(Method):
    """Builds a table that nobody asked for."""

    api_version = 1

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"mine": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}
