"""The code of README and of the pages is run: one name space a page, its blocks in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stillhouse

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/index.md", "docs/embedding.md", "docs/plugins/own-task.md")


def blocks(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def what_the_reader_has() -> dict[str, object]:
    """Models and data of the reader's own, under the names that the pages use."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = torch.randint(0, 4, (64,))
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    return {
        "student": student,
        "teacher": teacher,
        "x": x,
        "y": y,
        "u": torch.randn(64, 6),
        "loader": loader,
        "torch": torch,
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found
    names = what_the_reader_has()
    for block in found:
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert names["step"].info.index == 8, "every update of README's loop counts"


def test_the_regressor_of_readmes_loop_moves(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = what_the_reader_has()
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    own = torch.optim.AdamW

    def watching(groups, **settings):
        kept.extend((p, p.detach().clone()) for group in groups for p in group["params"])
        return own(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", watching)
    block = next(block for block in blocks("README.md") if "fitnets" in block)
    exec(compile(block, "README.md", "exec"), {**names, "stillhouse": stillhouse})
    beside = [pair for pair in kept if not any(pair[0] is p for p in names["student"].parameters())]
    assert beside, "the regressor stands among the parameter groups"
    assert all(not torch.equal(p, before) for p, before in beside)


def test_the_site_builds_without_a_warning(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "pitfalls" / "index.html").is_file()
