"""What a study leaves to be read: one page of HTML, Markdown, LaTeX and CSV."""

from stillhouse.study.report.write import write

__all__ = ["write"]
