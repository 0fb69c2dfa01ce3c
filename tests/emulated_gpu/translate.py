"""kernels_cuda's sources as C++ for this CPU: cuda.h has what CUDA adds to the language, ptx.h the instructions of asm statements."""
import re

OPERAND = re.compile(r'\s*"[^"]*"\s*\(')


def translate(source: str) -> str:
    """The text of a .cu with its headers in place -> C++. ValueError: an asm statement of a form that is not known."""
    source = re.sub(r"DYNAMIC_SHARED\((\w+), (\w+)\);", r"\1* const \2 = reinterpret_cast<\1*>(emulated::shared);", source)
    parts, done = [], 0
    for found in re.finditer(r"\basm\s*(?:volatile\s*)?\(", source):
        end = _closing(source, found.end())
        parts += source[done:found.start()], _statement(source[found.end():end])
        done = end + 1
    return "".join(parts) + source[done:]


def _statement(text):
    """`"op %0, {%1, %2}, [%3];" : "=r"(a) ...`, as a call of ptx::op."""
    template, rest = re.match(r'\s*((?:"[^"]*"\s*)+)(.*)', text, re.DOTALL).groups()
    template = "".join(re.findall(r'"([^"]*)"', template))
    operands, at = [], 0
    while found := OPERAND.search(rest, at):
        at = _closing(rest, found.end())
        operands.append(rest[found.end():at])
    form = re.fullmatch(r"\s*([\w.:]+)\s*([^;]*);\s*", template)
    if not form:
        raise ValueError(f"not one instruction: {template}")
    words = re.sub(r"%(\d+)", lambda n: f"({operands[int(n[1])]})", re.sub(r"[{}\[\]]", "", form[2]))
    return f"ptx::{re.sub(r'[.:]', '_', form[1])}({words})"


def _closing(text, at):
    """The place of the bracket that closes the one before `at`."""
    depth = 1
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text[at:]):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if not depth:
            return at + found.start()
    raise ValueError("an asm statement without an end")
