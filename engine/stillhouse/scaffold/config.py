"""``stillhouse init``: a config for a task, with comments, to be filled in and run."""

from __future__ import annotations

from pathlib import Path

from stillhouse.errors import ConfigError, nearest

_HEAD = """# {about}
# Run it: stillhouse run {file}. Then: stillhouse export {out} --to transformers --out DIR
name: {name}
task:
  name: {task}
  train: {train}  # {data}; validation: and test: likewise
{columns}
{method}
teacher: {{name: pretrained, path: {teacher}}}  # a folder of save_pretrained
student: {{name: pretrained, path: {student}}}  # or {{name: fresh, path: ..., layers: 2, width: 128}}: new weights
steps: 1000
batch_size: 16
optimizer: {{lr: 5.0e-4}}
scheduler: CosineAnnealingLR
clip: 1.0
out: {out}
"""

_TEXT = """  tokenizer: {student}  # a folder with the models' tokenizer
  length: 128  # tokens of a row, at most"""
_LABEL = f"{_TEXT}\n  label_column: label  # text_column: likewise"
_IMAGES = "  size: 224  # pixels of a side; mean: and std: are ImageNet's"
_KD = "method: {name: kd, temperature: 2.0}"
_FILES = "a file (json, jsonl, csv, parquet, txt) or a folder of such"
_FOLDER = "a folder with a folder of images for each class"
TASKS = {
    "causal-lm": ("Distil a causal language model on running text.", _TEXT, _KD),
    "image-folder": ("Distil a classifier of images.", _IMAGES, _KD),
    "text-classification": ("Distil a classifier of texts.", _LABEL, _KD),
    "token-classification": ("Distil a classifier of words.", _LABEL, _KD),
    "sentence-embeddings": (
        "Distil a model of sentence embeddings on text without labels.",
        _TEXT,
        "methods: [{name: fitnets, layers: uniform}, {name: rkd, layers: last}]  # hidden states, and the texts' relations",
    ),
}


def write(
    task: str, file: Path, *, train: str = "data", teacher: str = "teacher", student: str = "student"
) -> None:
    """Write a config for ``task``; ConfigError for an unknown task, or a file that is there."""
    if task not in TASKS:
        raise ConfigError(f"no config can be made for the task '{task}'{nearest(task, TASKS)}")
    if file.exists():
        raise ConfigError(f"{file} is there; expected a new file: name another with --file")
    about, columns, method = TASKS[task]
    name = file.stem
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        _HEAD.format(
            about=about,
            file=file,
            out=f"runs/{name}",
            name=name,
            task=task,
            train=train,
            teacher=teacher,
            student=student,
            columns=columns.format(student=student),
            data=_FOLDER if task == "image-folder" else _FILES,
            method=method,
        ),
        encoding="utf-8",
    )
