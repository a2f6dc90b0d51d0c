"""Questions about matrices, intervals and graphs."""

import itertools
from random import Random
from typing import Any

from wmtp_ds.data.problem_steps import Step, noun

Grid = list[list[int]]


def _matrix(rng: Random) -> tuple[Any, ...]:
    rows, columns = rng.randint(1, 4), rng.randint(1, 4)
    return ([[rng.randint(0, 9) for _ in range(columns)] for _ in range(rows)],)


def _square(rng: Random) -> tuple[Any, ...]:
    size = rng.randint(1, 4)
    return ([[rng.randint(0, 9) for _ in range(size)] for _ in range(size)],)


def _bits(rng: Random) -> tuple[Any, ...]:
    rows, columns = rng.randint(1, 4), rng.randint(1, 4)
    return ([[int(rng.random() < 0.6) for _ in range(columns)] for _ in range(rows)],)


def _maze(rng: Random) -> tuple[Any, ...]:
    rows, columns = rng.randint(1, 4), rng.randint(1, 4)
    grid = [[int(rng.random() < 0.25) for _ in range(columns)] for _ in range(rows)]
    grid[0][0] = grid[-1][-1] = 0
    return (grid,)


def _intervals(rng: Random) -> tuple[Any, ...]:
    starts = [rng.randint(0, 15) for _ in range(rng.randint(0, 5))]
    return ([(start, start + rng.randint(1, 6)) for start in starts],)


def _graph(rng: Random) -> tuple[Any, ...]:
    size = rng.randint(2, 6)
    edges = [tuple(rng.sample(range(size), 2)) for _ in range(rng.randint(0, size))]
    return size, edges


def _items(rng: Random) -> tuple[Any, ...]:
    return [(rng.randint(1, 6), rng.randint(1, 12)) for _ in range(rng.randint(0, 5))], rng.randint(0, 12)


def _spiral(grid: Grid) -> list[int]:
    """Take the first row off and turn what is left, until nothing is."""
    taken: list[int] = []
    while grid:
        taken += grid[0]
        grid = [list(column) for column in zip(*grid[1:], strict=True)][::-1]
    return taken


def _paths(grid: Grid) -> list[list[tuple[int, int]]]:
    """Every path from the first to the last cell that goes right and down."""
    rows, columns = len(grid), len(grid[0])
    found = []
    for downs in itertools.combinations(range(rows + columns - 2), rows - 1):
        cell = (0, 0)
        path = [cell]
        for step in range(rows + columns - 2):
            cell = (cell[0] + 1, cell[1]) if step in downs else (cell[0], cell[1] + 1)
            path.append(cell)
        found.append(path)
    return found


def _components(nodes: set[Any], edges: set[tuple[Any, Any]]) -> list[set[Any]]:
    """Merge the sets of both ends of each edge."""
    sets = [{node} for node in nodes]
    for a, b in edges:
        touched = [s for s in sets if a in s or b in s]
        sets = [s for s in sets if s not in touched] + [set().union(*touched)]
    return sets


def _islands(grid: Grid) -> list[set[Any]]:
    cells = {(i, j) for i, row in enumerate(grid) for j, value in enumerate(row) if value}
    edges = {(a, b) for a in cells for b in cells if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1}
    return _components(cells, edges)


def _distance(size: int, edges: list[tuple[int, int]], source: int, target: int) -> int:
    """Bellman's recursion over the number of steps."""
    reached = {source}
    for steps in range(size):
        if target in reached:
            return steps
        reached |= {b for a, b in edges if a in reached}
    return -1


def _maze_distance(grid: Grid) -> int:
    free = [(i, j) for i, row in enumerate(grid) for j, value in enumerate(row) if not value]
    index = {cell: number for number, cell in enumerate(free)}
    edges = [(index[a], index[b]) for a in free for b in free if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    return _distance(len(free) + 1, edges, 0, len(free) - 1)


def _orderable(size: int, edges: list[tuple[int, int]]) -> bool:
    return any(all(order.index(a) < order.index(b) for a, b in edges) for order in itertools.permutations(range(size)))


def _life(grid: Grid) -> Grid:
    def alive(i: int, j: int) -> int:
        around = [
            grid[y][x]
            for y in range(max(0, i - 1), min(len(grid), i + 2))
            for x in range(max(0, j - 1), min(len(grid[0]), j + 2))
        ]
        total = sum(around)
        return int(total == 3 or (total == 4 and grid[i][j] == 1))

    return [[alive(i, j) for j in range(len(grid[0]))] for i in range(len(grid))]


def matrices() -> list[Step]:
    """Questions about a matrix."""
    return [
        noun(
            lambda g: [[row[j] for row in g] for j in range(len(g[0]))],
            """transposed | grid -> grid | 3 | its transpose

            OUT = [list(column) for column in zip(*IN)]
            ---
            OUT = []
            for j in range(len(IN[0])):
                OUT.append([row[j] for row in IN])
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: [list(row) for row in zip(*reversed(g), strict=True)],
            """turned | grid -> grid | 5 | it turned by a quarter to the right

            OUT = []
            for j in range(len(IN[0])):
                OUT.append([IN[i][j] for i in range(len(IN) - 1, -1, -1)])
            ---
            OUT = [[row[j] for row in IN[::-1]] for j in range(len(IN[0]))]
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: [sum(row) for row in g],
            """row_sums | grid -> ints | 2 | the list of the sums of its rows

            OUT = [sum(row) for row in IN]
            ---
            OUT = []
            for row in IN:
                total = 0
                for x in row:
                    total += x
                OUT.append(total)
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: [sum(column) for column in zip(*g, strict=True)],
            """column_sums | grid -> ints | 3 | the list of the sums of its columns

            OUT = [sum(row[j] for row in IN) for j in range(len(IN[0]))]
            ---
            OUT = [0] * len(IN[0])
            for row in IN:
                for j, x in enumerate(row):
                    OUT[j] += x
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: list(itertools.chain.from_iterable(g)),
            """flat | grid -> ints | 2 | the list of all its numbers, row by row

            OUT = [x for row in IN for x in row]
            ---
            OUT = []
            for row in IN:
                OUT += row
            ---
            OUT = sum(IN, [])
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: sum(g[i][j] for i in range(len(g)) for j in range(len(g)) if i == j),
            """trace | grid -> int | 3 | the sum of its diagonal (it is square)

            OUT = sum(IN[i][i] for i in range(len(IN)))
            ---
            OUT = 0
            for i, row in enumerate(IN):
                OUT += row[i]
            """,
            inputs=_square,
        ),
        noun(
            _spiral,
            """spiral | grid -> ints | 8 | the list of its numbers in clockwise spiral order from the top
            left corner inwards

            OUT = []
            top = 0
            bottom = len(IN) - 1
            left = 0
            right = len(IN[0]) - 1
            while top <= bottom and left <= right:
                for j in range(left, right + 1):
                    OUT.append(IN[top][j])
                for i in range(top + 1, bottom + 1):
                    OUT.append(IN[i][right])
                if top < bottom and left < right:
                    for j in range(right - 1, left - 1, -1):
                        OUT.append(IN[bottom][j])
                    for i in range(bottom - 1, top, -1):
                        OUT.append(IN[i][left])
                top += 1
                bottom -= 1
                left += 1
                right -= 1
            ---
            OUT = []
            seen = set()
            i, j = 0, 0
            di, dj = 0, 1
            for step in range(len(IN) * len(IN[0])):
                OUT.append(IN[i][j])
                seen.add((i, j))
                a, b = i + di, j + dj
                if not (0 <= a < len(IN) and 0 <= b < len(IN[0])) or (a, b) in seen:
                    di, dj = dj, -di
                i, j = i + di, j + dj
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: min(sum(g[i][j] for i, j in path) for path in _paths(g)),
            """cheapest_path | grid -> int | 9 | the smallest sum of the numbers on a path from the top
            left to the bottom right that goes right or down

            row = []
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    if i == 0 and j == 0:
                        row.append(IN[0][0])
                    elif i == 0:
                        row.append(row[j - 1] + IN[0][j])
                    elif j == 0:
                        row[0] += IN[i][0]
                    else:
                        row[j] = min(row[j], row[j - 1]) + IN[i][j]
            OUT = row[-1]
            ---
            def cost(i, j):
                if i == 0 and j == 0:
                    return IN[0][0]
                ways = []
                if i > 0:
                    ways.append(cost(i - 1, j))
                if j > 0:
                    ways.append(cost(i, j - 1))
                return min(ways) + IN[i][j]
            OUT = cost(len(IN) - 1, len(IN[0]) - 1)
            """,
            inputs=_matrix,
        ),
        noun(
            lambda g: sum(all(g[i][j] == 0 for i, j in path) for path in _paths(g)),
            """paths | grid -> int | 9 | how many paths lead from the top left to the bottom right over
            zeros alone, going right or down

            ways = [[0] * len(IN[0]) for row in IN]
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    if IN[i][j] == 0:
                        if i == 0 and j == 0:
                            ways[i][j] = 1
                        if i > 0:
                            ways[i][j] += ways[i - 1][j]
                        if j > 0:
                            ways[i][j] += ways[i][j - 1]
            OUT = ways[-1][-1]
            ---
            def count(i, j):
                if i < 0 or j < 0 or IN[i][j] != 0:
                    return 0
                if i == 0 and j == 0:
                    return 1
                return count(i - 1, j) + count(i, j - 1)
            OUT = count(len(IN) - 1, len(IN[0]) - 1)
            """,
            inputs=_maze,
        ),
    ]


def regions() -> list[Step]:
    """Questions that need a search through a matrix."""
    return [
        noun(
            lambda g: len(_islands(g)),
            """islands | grid -> int | 10 | how many groups of ones it has, where ones side by side or one
            above the other belong together

            left = {(i, j) for i in range(len(IN)) for j in range(len(IN[0])) if IN[i][j] == 1}
            OUT = 0
            while left:
                OUT += 1
                stack = [left.pop()]
                while stack:
                    i, j = stack.pop()
                    for cell in [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]:
                        if cell in left:
                            left.remove(cell)
                            stack.append(cell)
            ---
            seen = set()
            def visit(i, j):
                if (i, j) in seen or not (0 <= i < len(IN) and 0 <= j < len(IN[0])) or IN[i][j] == 0:
                    return 0
                seen.add((i, j))
                visit(i + 1, j)
                visit(i - 1, j)
                visit(i, j + 1)
                visit(i, j - 1)
                return 1
            OUT = 0
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    OUT += visit(i, j)
            """,
            inputs=_bits,
        ),
        noun(
            lambda g: max(map(len, _islands(g)), default=0),
            """largest_island | grid -> int | 10 | the size of its largest group of ones, where ones side
            by side or one above the other belong together

            seen = set()
            def size(i, j):
                if (i, j) in seen or not (0 <= i < len(IN) and 0 <= j < len(IN[0])) or IN[i][j] == 0:
                    return 0
                seen.add((i, j))
                return 1 + size(i + 1, j) + size(i - 1, j) + size(i, j + 1) + size(i, j - 1)
            OUT = 0
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    OUT = max(OUT, size(i, j))
            ---
            left = {(i, j) for i in range(len(IN)) for j in range(len(IN[0])) if IN[i][j] == 1}
            OUT = 0
            while left:
                stack = [left.pop()]
                total = 0
                while stack:
                    i, j = stack.pop()
                    total += 1
                    for cell in [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]:
                        if cell in left:
                            left.remove(cell)
                            stack.append(cell)
                if total > OUT:
                    OUT = total
            """,
            inputs=_bits,
        ),
        noun(
            _maze_distance,
            """shortest_path | grid -> int | 11 | how few steps to a neighbouring zero lead from the top
            left to the bottom right (-1 if there is no way)

            queue = [(0, 0)]
            steps = {(0, 0): 0}
            for i, j in queue:
                for a, b in [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]:
                    if 0 <= a < len(IN) and 0 <= b < len(IN[0]) and IN[a][b] == 0 and (a, b) not in steps:
                        steps[a, b] = steps[i, j] + 1
                        queue.append((a, b))
            OUT = steps.get((len(IN) - 1, len(IN[0]) - 1), -1)
            ---
            target = (len(IN) - 1, len(IN[0]) - 1)
            border = {(0, 0)}
            seen = set()
            steps = 0
            while border and target not in border:
                seen |= border
                border = {(a, b) for i, j in border for a, b in [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
                          if 0 <= a < len(IN) and 0 <= b < len(IN[0]) and IN[a][b] == 0 and (a, b) not in seen}
                steps += 1
            OUT = steps if border else -1
            """,
            inputs=_maze,
        ),
        noun(
            lambda g: max(
                k
                for k in range(min(len(g), len(g[0])) + 1)
                for i in range(len(g) - k + 1)
                for j in range(len(g[0]) - k + 1)
                if all(all(row[j : j + k]) for row in g[i : i + k])
            ),
            """largest_square | grid -> int | 10 | the side of its largest square of ones

            OUT = 0
            size = [[0] * (len(IN[0]) + 1) for i in range(len(IN) + 1)]
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    if IN[i][j] == 1:
                        size[i + 1][j + 1] = 1 + min(size[i][j], size[i][j + 1], size[i + 1][j])
                        OUT = max(OUT, size[i + 1][j + 1])
            ---
            OUT = 0
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    k = 0
                    while i + k < len(IN) and j + k < len(IN[0]) and all(
                        IN[a][b] == 1 for a in range(i, i + k + 1) for b in range(j, j + k + 1)
                    ):
                        k += 1
                    OUT = max(OUT, k)
            """,
            inputs=_bits,
        ),
        noun(
            _life,
            """next_generation | grid -> grid | 9 | the next generation in Conway's game of life, where
            ones are alive and all cells outside are dead

            OUT = []
            for i in range(len(IN)):
                line = []
                for j in range(len(IN[0])):
                    total = -IN[i][j]
                    for a in range(max(0, i - 1), min(len(IN), i + 2)):
                        for b in range(max(0, j - 1), min(len(IN[0]), j + 2)):
                            total += IN[a][b]
                    line.append(1 if total == 3 or (total == 2 and IN[i][j] == 1) else 0)
                OUT.append(line)
            ---
            alive = {(i, j) for i, row in enumerate(IN) for j, x in enumerate(row) if x}
            OUT = [[0] * len(IN[0]) for row in IN]
            for i in range(len(IN)):
                for j in range(len(IN[0])):
                    near = sum((i + a, j + b) in alive for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)
                    if near == 3 or (near == 2 and (i, j) in alive):
                        OUT[i][j] = 1
            """,
            inputs=_bits,
        ),
    ]


def pairs_and_graphs() -> list[Step]:
    """Questions about pairs of integers: intervals, edges of a graph, things with a weight and a value."""
    return [
        noun(
            lambda p: len({x for a, b in p for x in range(a, b)}),
            """covered | pairs -> int | 7 | the length that the half-open intervals (start, end) cover
            together

            OUT = 0
            end = 0
            for a, b in sorted(IN):
                a = max(a, end)
                if b > a:
                    OUT += b - a
                    end = b
            ---
            covered = set()
            for a, b in IN:
                for x in range(a, b):
                    covered.add(x)
            OUT = len(covered)
            """,
            inputs=_intervals,
        ),
        noun(
            lambda p: max((sum(a <= x < b for a, b in p) for x in range(25)), default=0),
            """overlap | pairs -> int | 7 | how many of the half-open intervals (start, end) overlap at
            most at one point

            OUT = 0
            for x, y in IN:
                OUT = max(OUT, sum(1 for a, b in IN if a <= x < b))
            ---
            events = sorted([(a, 1) for a, b in IN] + [(b, -1) for a, b in IN])
            OUT = 0
            level = 0
            for x, change in events:
                level += change
                OUT = max(OUT, level)
            """,
            inputs=_intervals,
        ),
        noun(
            lambda p: max(
                n
                for n in range(len(p) + 1)
                for s in itertools.combinations(p, n)
                if all(a[1] <= b[0] or b[1] <= a[0] for a, b in itertools.combinations(s, 2))
            ),
            """most_meetings | pairs -> int | 9 | how many of the half-open intervals (start, end) can be
            chosen at most so that no two overlap

            OUT = 0
            end = 0
            for b, a in sorted((b, a) for a, b in IN):
                if a >= end:
                    OUT += 1
                    end = b
            ---
            def best(end):
                return max([1 + best(b) for a, b in IN if a >= end], default=0)
            OUT = best(0)
            """,
            inputs=_intervals,
        ),
        noun(
            lambda p, c: max(
                sum(v for _, v in s)
                for n in range(len(p) + 1)
                for s in itertools.combinations(p, n)
                if sum(w for w, _ in s) <= c
            ),
            """knapsack | pairs int -> int | 10 | the largest total value of some of the things (weight,
            value) that together weigh at most the integer

            best = [0] * (IN2 + 1)
            for weight, value in IN:
                for i in range(IN2, weight - 1, -1):
                    best[i] = max(best[i], best[i - weight] + value)
            OUT = best[IN2]
            ---
            def take(i, left):
                if i == len(IN):
                    return 0
                weight, value = IN[i]
                OUT = take(i + 1, left)
                if weight <= left:
                    OUT = max(OUT, value + take(i + 1, left - weight))
                return OUT
            OUT = take(0, IN2)
            """,
            inputs=_items,
        ),
        noun(
            lambda n, edges: len(_components(set(range(n)), set(edges))),
            """components | int pairs -> int | 9 | how many connected parts the undirected graph has (the
            number of its nodes, counted from 0, and its edges)

            parent = list(range(IN))
            def find(x):
                while parent[x] != x:
                    x = parent[x]
                return x
            for a, b in IN2:
                parent[find(a)] = find(b)
            OUT = sum(1 for x in range(IN) if parent[x] == x)
            ---
            seen = set()
            OUT = 0
            for x in range(IN):
                if x not in seen:
                    OUT += 1
                    stack = [x]
                    while stack:
                        y = stack.pop()
                        seen.add(y)
                        for a, b in IN2:
                            if a == y and b not in seen:
                                stack.append(b)
                            if b == y and a not in seen:
                                stack.append(a)
            """,
            inputs=_graph,
        ),
        noun(
            lambda n, edges: _distance(n, edges, 0, n - 1),
            """hops | int pairs -> int | 10 | how few edges lead from the first node to the last in the
            directed graph (-1 if there is no way; the number of its nodes, counted from 0, and its
            edges)

            steps = {0: 0}
            queue = [0]
            for x in queue:
                for a, b in IN2:
                    if a == x and b not in steps:
                        steps[b] = steps[x] + 1
                        queue.append(b)
            OUT = steps.get(IN - 1, -1)
            ---
            far = IN + 1
            steps = [far] * IN
            steps[0] = 0
            for i in range(IN):
                for a, b in IN2:
                    steps[b] = min(steps[b], steps[a] + 1)
            OUT = steps[IN - 1] if steps[IN - 1] < far else -1
            """,
            inputs=_graph,
        ),
        noun(
            _orderable,
            """is_orderable | int pairs -> flag | 11 | whether the nodes of the directed graph can be put
            in an order in which every edge leads forward (the number of its nodes, counted from 0, and
            its edges)

            left = set(range(IN))
            found = True
            while found:
                found = False
                for x in list(left):
                    if not any(b == x and a in left for a, b in IN2):
                        left.remove(x)
                        found = True
            OUT = not left
            ---
            degree = [0] * IN
            for a, b in IN2:
                degree[b] += 1
            queue = [x for x in range(IN) if degree[x] == 0]
            for x in queue:
                for a, b in IN2:
                    if a == x:
                        degree[b] -= 1
                        if degree[b] == 0:
                            queue.append(b)
            OUT = len(queue) == IN
            """,
            inputs=_graph,
        ),
        noun(
            lambda n, edges: any(
                all((a in side) != (b in side) for a, b in edges)
                for k in range(n + 1)
                for side in map(set, itertools.combinations(range(n), k))
            ),
            """is_bipartite | int pairs -> flag | 11 | whether the nodes of the undirected graph can be
            coloured with two colours so that every edge joins different ones (the number of its nodes,
            counted from 0, and its edges)

            colour = [0] * IN
            OUT = True
            for x in range(IN):
                if colour[x] == 0:
                    colour[x] = 1
                    queue = [x]
                    for y in queue:
                        for a, b in IN2:
                            if b == y:
                                a, b = b, a
                            if a == y and colour[b] == 0:
                                colour[b] = -colour[y]
                                queue.append(b)
            for a, b in IN2:
                if colour[a] == colour[b]:
                    OUT = False
            ---
            def paint(x, colours):
                if x == IN:
                    return all(colours[a] != colours[b] for a, b in IN2)
                return paint(x + 1, colours + [0]) or paint(x + 1, colours + [1])
            OUT = paint(0, [])
            """,
            inputs=_graph,
        ),
    ]
