"""PTX text to basic blocks: just what the kernels here compile to, and a clear error for anything else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

REGISTER_TYPES = {
    "pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32,
}  # fmt: skip
SIZES = {
    "u8": 1,
    "b8": 1,
    "u16": 2,
    "b16": 2,
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "f32": 4,
    "u64": 8,
    "s64": 8,
    "b64": 8,
}
# what ends a block: control leaves it, or lanes may have to wait before the next instruction
ENDS = ("bra", "ret", "exit", "bar.sync", "barrier.sync", "bar.warp.sync", "barrier.cluster.wait")


@dataclass
class Instruction:
    opcode: str
    operands: list[str]
    guard: str | None = None  # predicate register
    negated: bool = False
    text: str = ""

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Program:
    """One kernel. ``shared`` maps a variable to its offset; the dynamic part starts at ``static_bytes``."""

    name: str
    parameters: list[tuple[str, str]]  # (type, name)
    registers: dict[str, type]
    shared: dict[str, int]
    static_bytes: int
    blocks: list[Block]
    labels: dict[str, int]


def _split_operands(text: str) -> list[str]:
    """At commas outside of {...} and [...]."""
    out, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += char
    return [*out, current.strip()] if current.strip() else out


def _instruction(text: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", text.strip(), re.DOTALL)
    if match is None:
        raise ValueError(f"not an instruction: {text!r}")
    negated, guard, opcode, rest = match.groups()
    return Instruction(opcode, _split_operands(rest), guard, negated == "!", text.strip())


def _scoped(body: str, number: int, registers: dict[str, type]) -> list[str]:
    """The statements of an inline ``{.reg ...; ...}``, its registers renamed so that no two snippets share one."""
    statements = [s.strip() for s in body.split(";") if s.strip()]
    renames = {}
    for declaration in (s for s in statements if s.startswith(".reg")):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", declaration).groups()
        for name in names.split(","):
            renames[name.strip()] = f"%scoped{number}_{name.strip()}"
            registers[renames[name.strip()]] = REGISTER_TYPES[kind]
    pattern = re.compile(r"(?<![%\w.])(" + "|".join(map(re.escape, renames)) + r")(?!\w)")
    return [pattern.sub(lambda m: renames[m[1]], s) for s in statements if not s.startswith(".reg")]


def _declarations(body: str) -> dict[str, type]:
    registers: dict[str, type] = {}
    for kind, prefix, count in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;", body):
        registers |= {f"{prefix}{i}": REGISTER_TYPES[kind] for i in range(int(count))}
    return registers


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    offsets, end, dynamic = {}, 0, []
    for linkage, align, name, size in re.findall(
        r"\.(visible |extern |)\s*\.?shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\];", text
    ):
        if "extern" in linkage or not size:
            dynamic.append(name)
            continue
        end = -(-end // int(align)) * int(align)
        offsets[name] = end
        end += int(size)
    end = -(-end // 16) * 16
    return offsets | dict.fromkeys(dynamic, end), end


def parse(text: str) -> Program:
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.visible\s+\.entry\s+(\w+)\(([^)]*)\)[^{]*\{(.*)\}\s*$", text, re.DOTALL)
    if entry is None:
        raise ValueError("no .visible .entry with a body in this PTX")
    name, parameter_text, body = entry.groups()
    parameters = re.findall(r"\.param\s+\.(\w+)\s+(\w+)", parameter_text)
    shared, static_bytes = _shared_variables(text[: entry.start()] + body)
    registers = _declarations(body)
    body = re.sub(r"\.reg\s+\.\w+\s+%\w+<\d+>;", "", body)
    body = re.sub(r"\.pragma[^;]*;", "", body)
    snippets: list[str] = []

    def lift(match: re.Match) -> str:
        snippets.append(match[1])
        return f"SNIPPET {len(snippets) - 1};"

    body = re.sub(r"\{\s*(\.reg[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", lift, body)
    body = re.sub(r"(\$\w+):", r"LABEL \1;", body)
    blocks, labels = [Block()], {}
    for statement in filter(None, (s.strip() for s in body.split(";"))):
        word, _, rest = statement.partition(" ")
        if word == "LABEL":
            labels[rest] = len(blocks)
            blocks.append(Block())
            continue
        for item in _scoped(snippets[int(rest)], int(rest), registers) if word == "SNIPPET" else [statement]:
            instruction = _instruction(item)
            blocks[-1].instructions.append(instruction)
            if instruction.opcode.startswith(ENDS):
                blocks.append(Block())
    return Program(name, parameters, registers, shared, static_bytes, blocks, labels)
