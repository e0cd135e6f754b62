"""The shapes of generated questions, their weights, and how each composes with the ways of picking rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from cllm.tasks.sql_databases import Database
from cllm.tasks.sql_grammar import AGGREGATES, SOURCE_KINDS, Draw, Source
from cllm.tasks.sql_schemas import Column, ColumnKind, Table

Pair = tuple[str, str]  # question, SQL


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of query.

    Attributes:
        weight: how often it is drawn, relative to the others.
        sources: the ways of picking rows it composes with (`SOURCE_KINDS`), with weights.
        needs: a table can be asked about in this shape if it has a column of each of these kinds.
        needs_parent: whether the table must have a parent.
    """

    weight: float
    build: Callable[[Draw, Source], Pair]
    sources: Mapping[str, float]
    needs: tuple[ColumnKind, ...] = ()
    needs_parent: bool = False

    def fits(self, table: Table) -> bool:
        """Whether a table can be asked about in this shape."""
        return (bool(table.parents) or not self.needs_parent) and all(table.of_kind(kind) for kind in self.needs)


def sample_question(database: Database, rng: Random) -> Pair:
    """A random question about a database, with its one gold query."""
    shape = rng.choices(_SHAPE_LIST, _WEIGHTS)[0]
    draw = Draw(database, rng)
    tables = [table for table in database.schema.tables if shape.fits(table)]
    if not tables:  # a small random schema may lack what a shape needs
        shape, tables = SHAPES["list"], list(database.schema.tables)
    table = draw.pick(tables)
    kind = rng.choices(tuple(shape.sources), tuple(shape.sources.values()))[0]
    return shape.build(draw, draw.source(SOURCE_KINDS[kind], table))


def _shown(source: Source, columns: list[Column]) -> str:
    return ", ".join(source.column(column) for column in columns)


def _show(draw: Draw, what: str) -> str:
    return f"{draw.pick(('show', 'list', 'find'))} the {what}"


def _list(draw: Draw, source: Source) -> Pair:
    columns = draw.columns(source.table)
    return _show(draw, f"{draw.listing(columns)} of {source.phrase}"), source.select(_shown(source, columns))


def _list_parent(draw: Draw, source: Source) -> Pair:
    parent, columns, far = _parent_column(draw, source, ("number", "category", "label"))
    words = f"{draw.listing([*columns])} and {parent.name} {draw.mention(far)}"
    return _show(draw, f"{words} of {source.phrase}"), source.select(f"{_shown(source, columns)}, T2.{far.name}")


def _parent_column(draw: Draw, source: Source, kinds: tuple[ColumnKind, ...]) -> tuple[Table, list[Column], Column]:
    assert source.parent is not None  # the shape's sources all join
    far = source.parent.of_kind(*kinds) or source.parent.columns
    return source.parent, [draw.pick(source.table.columns)], draw.pick(far)


def _distinct(draw: Draw, source: Source) -> Pair:
    column = draw.pick(source.table.columns)
    words = f"{draw.pick(('different', 'distinct'))} {draw.mention(column)} of {source.phrase}"
    return _show(draw, words), source.select(f"DISTINCT {source.column(column)}")


def _count(draw: Draw, source: Source) -> Pair:
    return f"{draw.pick(('how many', 'count the'))} {source.phrase}", source.select("COUNT(*)")


def _count_distinct(draw: Draw, source: Source) -> Pair:
    column = draw.pick(source.table.columns)
    start = draw.pick(("how many different", "count the distinct"))
    question = f"{start} {draw.mention(column)} of {source.phrase}"
    return question, source.select(f"COUNT(DISTINCT {source.column(column)})")


def _aggregate(draw: Draw, source: Source) -> Pair:
    column, function = draw.pick(source.table.of_kind("number")), draw.pick(tuple(AGGREGATES))
    words = f"{draw.pick(AGGREGATES[function])} {draw.mention(column)} of {source.phrase}"
    start = draw.pick(("what is", "find", "show"))
    return f"{start} the {words}", source.select(f"{function}({source.column(column)})")


def _two_aggregates(draw: Draw, source: Source) -> Pair:
    column = draw.pick(source.table.of_kind("number"))
    functions = draw.rng.sample(tuple(AGGREGATES), 2)
    words = " and ".join(draw.pick(AGGREGATES[function]) for function in functions)
    shown = ", ".join(f"{function}({source.column(column)})" for function in functions)
    return _show(draw, f"{words} {draw.mention(column)} of {source.phrase}"), source.select(shown)


def _order(draw: Draw, source: Source) -> Pair:
    columns, key = draw.columns(source.table), draw.pick(source.table.of_kind("number", "label"))
    direction, word = draw.pick((("ASC", "ascending"), ("DESC", "descending")))
    order = f"{draw.pick(('sorted', 'ordered'))} by {word} {draw.mention(key)}"
    words = f"{draw.listing(columns)} of {source.phrase} {order}"
    return _show(draw, words), source.select(_shown(source, columns), f" ORDER BY {source.column(key)} {direction}")


def _top(draw: Draw, source: Source) -> Pair:
    columns, key = draw.columns(source.table), draw.pick(source.table.of_kind("number"))
    direction, word = draw.pick((("DESC", "top"), ("ASC", "bottom")))
    limit = draw.rng.randint(1, 9)
    words = f"{draw.listing(columns)} of the {word} {limit} {source.phrase} by {draw.mention(key)}"
    tail = f" ORDER BY {source.column(key)} {direction} LIMIT {limit}"
    return _show(draw, words), source.select(_shown(source, columns), tail)


def _group_count(draw: Draw, source: Source) -> Pair:
    column = draw.pick(source.table.of_kind("category"))
    words = f"number of {source.phrase} {draw.pick(('for each', 'per'))} {draw.mention(column)}"
    group = source.column(column)
    return _show(draw, words), source.select(f"{group}, COUNT(*)", f" GROUP BY {group}")


def _group_aggregate(draw: Draw, source: Source) -> Pair:
    column, value = draw.pick(source.table.of_kind("category")), draw.pick(source.table.of_kind("number"))
    function = draw.pick(tuple(AGGREGATES))
    words = f"{draw.pick(AGGREGATES[function])} {draw.mention(value)} of {source.phrase}"
    group = source.column(column)
    tail = f" GROUP BY {group}"
    question = f"{words} {draw.pick(('for each', 'per'))} {draw.mention(column)}"
    return _show(draw, question), source.select(f"{group}, {function}({source.column(value)})", tail)


def _group_parent(draw: Draw, source: Source) -> Pair:
    parent, _, far = _parent_column(draw, source, ("category", "label"))
    words = f"number of {source.phrase} {draw.pick(('for each', 'per'))} {parent.name} {draw.mention(far)}"
    return _show(draw, words), source.select(f"T2.{far.name}, COUNT(*)", f" GROUP BY T2.{far.name}")


def _having_count(draw: Draw, source: Source) -> Pair:
    column = draw.pick(source.table.of_kind("category"))
    share = source.table.num_rows // (len(column.pool) * (2 if source.condition else 1))
    bound, group = draw.rng.randint(1, max(2, share)), source.column(column)
    operator, word = draw.pick(((">", "more than"), (">=", "at least")))
    question = f"which {draw.mention(column)} has {word} {bound} {source.phrase}"
    return question, source.select(group, f" GROUP BY {group} HAVING COUNT(*) {operator} {bound}")


def _having_average(draw: Draw, source: Source) -> Pair:
    column, value = draw.pick(source.table.of_kind("category")), draw.pick(source.table.of_kind("number"))
    middle = len(value.grid) // 2
    bound = value.grid[middle + draw.rng.randint(-middle // 4, middle // 4)]
    operator, word = draw.pick(((">", "over"), ("<", "under")))
    group = source.column(column)
    words = f"{draw.pick(AGGREGATES['AVG'])} {draw.mention(value)} {word} {bound} among {source.phrase}"
    tail = f" GROUP BY {group} HAVING AVG({source.column(value)}) {operator} {bound}"
    return f"which {draw.mention(column)} has {words}", source.select(group, tail)


def _most_common(draw: Draw, source: Source) -> Pair:
    column = draw.pick(source.table.of_kind("category"))
    direction, word = draw.pick((("DESC", "most"), ("ASC", "least")))
    group = source.column(column)
    tail = f" GROUP BY {group} ORDER BY COUNT(*) {direction} LIMIT 1"
    return _show(draw, f"{word} common {draw.mention(column)} of {source.phrase}"), source.select(group, tail)


def _beyond_average(draw: Draw, source: Source) -> Pair:
    columns, value = draw.columns(source.table), draw.pick(source.table.of_kind("number"))
    operator, word = draw.pick(((">", "above"), ("<", "below")))
    beyond = f"{draw.pick(('and', 'having'))} {draw.mention(value)} {word} average"
    words = f"{draw.listing(columns)} of {source.phrase} {beyond}"
    nested = f"{source.column(value)} {operator} (SELECT AVG({value.name}) FROM {source.table.name})"
    return _show(draw, words), source.select(_shown(source, columns), also=nested)


def _extreme(draw: Draw, source: Source) -> Pair:
    """The outer rows are all of the table; the source is inside the nested query."""
    columns, value = draw.columns(source.table), draw.pick(source.table.of_kind("number"))
    function = draw.pick(("MIN", "MAX"))
    words = f"{draw.pick(AGGREGATES[function])} {draw.mention(value)} of {source.phrase}"
    question = _show(draw, f"{draw.listing(columns)} of {source.table.plurals[0]} at the {words}")
    shown = ", ".join(column.name for column in columns)
    nested = source.select(f"{function}({source.column(value)})")
    return question, f"SELECT {shown} FROM {source.table.name} WHERE {value.name} = ({nested})"


def _parents(draw: Draw, source: Source, operator: str, phrases: tuple[str, ...]) -> Pair:
    parent = draw.parent_of(source.table)
    outer = draw.source(SOURCE_KINDS[draw.rng.choices(("all", "one"), (3, 1))[0]], parent)
    columns = draw.columns(parent)
    words = f"{draw.listing(columns)} of {outer.phrase} {draw.pick(phrases)} {source.phrase}"
    nested = source.select(f"{parent.name}_id")
    return _show(draw, words), outer.select(_shown(outer, columns), also=f"id {operator} ({nested})")


def _parents_in(draw: Draw, source: Source) -> Pair:
    return _parents(draw, source, "IN", ("that have", "which have"))


def _parents_not_in(draw: Draw, source: Source) -> Pair:
    return _parents(draw, source, "NOT IN", ("without", "that have no"))


_ROWS = {"all": 1.0, "one": 3.0, "and": 2.0, "or": 1.0, "parent": 3.0, "parent_one": 1.5, "grand": 0.5}
_GROUPS = {"all": 1.0, "one": 3.0, "parent": 2.0}
_JOINS = {"joined": 1.0, "joined_one": 3.0, "parent": 1.0, "parent_one": 1.0}
_NESTED = {"one": 3.0, "and": 1.0, "or": 0.5}

SHAPES: Mapping[str, Shape] = {
    "list": Shape(3.0, _list, _ROWS),
    "list_parent": Shape(2.5, _list_parent, _JOINS, needs_parent=True),
    "distinct": Shape(0.7, _distinct, _ROWS),
    "count": Shape(1.5, _count, _ROWS),
    "count_distinct": Shape(0.7, _count_distinct, _ROWS),
    "aggregate": Shape(1.5, _aggregate, _ROWS, ("number",)),
    "two_aggregates": Shape(0.8, _two_aggregates, _ROWS, ("number",)),
    "order": Shape(1.2, _order, _ROWS, ("number",)),
    "top": Shape(1.2, _top, _ROWS, ("number",)),
    "group_count": Shape(0.8, _group_count, _GROUPS, ("category",)),
    "group_aggregate": Shape(1.0, _group_aggregate, _GROUPS, ("category", "number")),
    "group_parent": Shape(1.0, _group_parent, _JOINS, needs_parent=True),
    "having_count": Shape(0.8, _having_count, {"all": 1.0, "one": 3.0}, ("category",)),
    "having_average": Shape(0.8, _having_average, {"all": 1.0, "one": 3.0}, ("category", "number")),
    "most_common": Shape(0.6, _most_common, _GROUPS, ("category",)),
    "beyond_average": Shape(1.0, _beyond_average, {"one": 3.0, "parent": 1.0}, ("number",)),
    "extreme": Shape(0.8, _extreme, _NESTED, ("number",)),
    "parents_in": Shape(1.2, _parents_in, _NESTED, needs_parent=True),
    "parents_not_in": Shape(1.2, _parents_not_in, {**_NESTED, "all": 0.3}, needs_parent=True),
}
_SHAPE_LIST = tuple(SHAPES.values())
_WEIGHTS = tuple(shape.weight for shape in SHAPES.values())
