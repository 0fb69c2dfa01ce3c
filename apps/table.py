"""Tables in Markdown whose columns line up in a terminal too: numbers to the right, the first column, which names things, to the left."""


def markdown(rows: list[list[str]]) -> str:
    """rows: of texts, the first of them the heading."""
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    return "\n".join([line(rows[0], widths), rule(widths), *(line(row, widths) for row in rows[1:])])


def line(cells: list[str], widths: list[int]) -> str:
    """One row, where not all are known yet."""
    return "| " + " | ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(cells, widths))) + " |"


def rule(widths: list[int]) -> str:
    """What follows the heading."""
    return "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
