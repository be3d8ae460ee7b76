"""The algorithms of Tables I and II to the letter, as an oracle: closed ranges, recursion through a binary tree.

The tree is the balanced one over a sorted list of nodes. The facts of each row stand here as the tables print them.
"""

from __future__ import annotations

Range = tuple[int, int]  # closed: first and last address


def table_1(nodes: list[Range], move: Range) -> tuple[list[Range], list[Range]]:
    """Return the nodes of a VBMM after a move, and the physical extent list entries emitted."""
    after: list[Range] = []
    emitted: list[Range] = []

    def visit(low: int, high: int, move: Range | None) -> None:
        if low == high:
            return
        middle = (low + high) // 2
        left, right, kept, entry = row_of_table_1(move, nodes[middle]) if move else (None, None, [nodes[middle]], None)
        visit(low, middle, left)
        after.extend(kept)
        if entry:
            emitted.append(entry)
        visit(middle + 1, high, right)

    visit(0, len(nodes), move)
    return after, emitted


def row_of_table_1(move: Range, node: Range) -> tuple[Range | None, Range | None, list[Range], Range | None]:
    """Return left recursion, right recursion, what the node becomes and the entry emitted."""
    (mls, mle), (vbs, vbe) = move, node
    if mle < vbs:
        return move, None, [node], None
    if mls > vbe:
        return None, move, [node], None
    start = (mls > vbs) - (mls < vbs)
    end = (mle > vbe) - (mle < vbe)
    return {
        (0, 0): (None, None, [], (mls, mle)),
        (0, 1): (None, (vbe + 1, mle), [], (mls, vbe)),
        (0, -1): (None, None, [(mle + 1, vbe)], (mls, mle)),
        (1, 0): (None, None, [(vbs, mls - 1)], (mls, mle)),
        (1, 1): (None, (vbe + 1, mle), [(vbs, mls - 1)], (mls, vbe)),
        (1, -1): (None, None, [(vbs, mls - 1), (mle + 1, vbe)], (mls, mle)),
        (-1, 0): ((mls, vbs - 1), None, [], (vbs, mle)),
        (-1, 1): ((mls, vbs - 1), (vbe + 1, mle), [], (vbs, vbe)),
        (-1, -1): ((mls, vbs - 1), None, [(mle + 1, vbe)], (vbs, mle)),
    }[start, end]


def table_2(nodes: list[Range], move: Range) -> tuple[list[Range], list[Range]]:  # noqa: C901 - a case for each row
    """Return the nodes of a VBMJ after a move, and the set BJMC."""
    collapse: list[Range] = []
    candidates: list[Range] = []

    def visit(low: int, high: int, mls: int, mle: int) -> None:
        if low == high:  # the child is missing
            collapse.append((mls, mle))
            candidates.append((mls, mle))
            return
        middle = (low + high) // 2
        vbs, vbe = nodes[middle]
        left, right = (low, middle), (middle + 1, high)
        if mle < vbs - 1:
            visit(*left, mls, mle)
        elif mle == vbs - 1:
            collapse.append((vbs, vbe))
            visit(*left, mls, mle)
        elif mls > vbe + 1:
            visit(*right, mls, mle)
        elif mls == vbe + 1:
            collapse.append((vbs, vbe))
            visit(*right, mls, mle)
        elif mls >= vbs and mle <= vbe:
            pass
        elif vbs <= mls <= vbe and mle > vbe:
            collapse.append((vbs, vbe))
            visit(*right, vbe + 1, mle)
        elif mls < vbs <= mle <= vbe:
            collapse.append((vbs, vbe))
            visit(*left, mls, vbs - 1)
        else:
            assert mls < vbs
            assert mle > vbe
            collapse.append((vbs, vbe))
            visit(*left, mls, vbs - 1)
            visit(*right, vbe + 1, mle)

    visit(0, len(nodes), *move)
    if not candidates:
        return nodes, []
    whole = min(start for start, _ in collapse), max(end for _, end in collapse)  # the greatest ending address
    return sorted([node for node in nodes if node not in collapse] + [whole]), sorted(candidates)


def closed(extents: list[tuple[int, int]]) -> list[Range]:
    return [(start, stop - 1) for start, stop in extents]
