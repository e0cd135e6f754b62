"""Building blocks of generated questions: conditions and the rows that a question is about, in words and in SQL.

Words determine the SQL: every choice of the SQL (operator, value, column, order of conditions) shows in the words,
while several wordings may mean the same SQL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from cllm.tasks.sql_databases import Database, Record, Value
from cllm.tasks.sql_schemas import Column, Table

T = TypeVar("T")

AGGREGATES: Mapping[str, tuple[str, ...]] = {
    "AVG": ("average", "mean"),
    "SUM": ("total",),
    "MIN": ("lowest", "minimum"),
    "MAX": ("highest", "maximum"),
}
_NUMBER_OPERATORS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("=", 3, ("{c} {a}", "{c} equal to {a}")),
    (">", 4, ("{c} over {a}", "{c} above {a}", "{c} greater than {a}")),
    ("<", 4, ("{c} under {a}", "{c} below {a}", "{c} less than {a}")),
    (">=", 2, ("{c} at least {a}",)),
    ("<=", 2, ("{c} at most {a}",)),
    ("BETWEEN", 3, ("{c} between {a} and {b}", "{c} from {a} to {b}")),
)
_WORD_OPERATORS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("=", 6, ("{c} {a}", "{c} equal to {a}")),
    ("!=", 2, ("{c} not {a}", "{c} other than {a}")),
    ("IN", 3, ("{c} {a} or {b}", "{c} either {a} or {b}")),
)
_LIKE_OPERATORS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("LIKE {a}%", 2, ("{c} starting with {a}", "{c} beginning with {a}")),
    ("LIKE %{a}", 1, ("{c} ending with {a}", "{c} ending in {a}")),
    ("LIKE %{a}%", 1, ("{c} containing {a}",)),
)


@dataclass(frozen=True, slots=True)
class SourceKind:
    """How rows are picked: `own` conditions on the table, `joins` upwards, and whether the farthest table has one."""

    own: int = 0
    joins: int = 0
    far: bool = False
    connector: str = "AND"


SOURCE_KINDS: Mapping[str, SourceKind] = {
    "all": SourceKind(),
    "one": SourceKind(own=1),
    "and": SourceKind(own=2),
    "or": SourceKind(own=2, connector="OR"),
    "joined": SourceKind(joins=1),
    "joined_one": SourceKind(own=1, joins=1),
    "parent": SourceKind(joins=1, far=True),
    "parent_one": SourceKind(own=1, joins=1, far=True),
    "grand": SourceKind(joins=2, far=True),
}


@dataclass(frozen=True, slots=True)
class Source:
    """The rows that a question is about.

    Attributes:
        phrase: in words, such as "nurses with age over 30".
        tables: the FROM clause without FROM.
        condition: the WHERE clause without WHERE; empty for all rows.
        parent: the joined parent (alias T2), if any.
    """

    table: Table
    phrase: str
    tables: str
    condition: str
    parent: Table | None

    def column(self, column: Column) -> str:
        """A column of the table itself as this query must write it."""
        return f"T1.{column.name}" if self.parent else column.name

    def select(self, projection: str, tail: str = "", *, also: str = "") -> str:
        """The query for a projection; `also` is a further condition, `tail` what follows the WHERE clause."""
        where = " AND ".join(part for part in (self.condition, also) if part)
        return f"SELECT {projection} FROM {self.tables}" + (f" WHERE {where}" if where else "") + tail


class Draw:
    """One question in the making: the database, the randomness, and the choices that shapes share."""

    def __init__(self, database: Database, rng: Random) -> None:
        self.database = database
        self.rng = rng
        self._tables = {table.name: table for table in database.schema.tables}

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[int(self.rng.random() * len(options))]

    def mention(self, column: Column) -> str:
        """A column in words: mostly its name."""
        return column.name if self.rng.random() < 0.7 else self.pick(column.mentions)

    def plural(self, table: Table) -> str:
        """A table's rows in words."""
        return table.plurals[0] if self.rng.random() < 0.7 else self.pick(table.plurals)

    def columns(self, table: Table) -> list[Column]:
        """One to three columns to show."""
        count = self.rng.choices((1, 2, 3), (5, 4, 2))[0]
        return self.rng.sample(table.columns, min(count, len(table.columns)))

    def listing(self, columns: Sequence[Column]) -> str:
        """Columns in words: "name", "name and age", "name, age and salary"."""
        words = [self.mention(column) for column in columns]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

    def parent_of(self, table: Table) -> Table:
        """A parent of a table that has one."""
        return self._tables[self.pick(table.parents)]

    def source(self, kind: SourceKind, table: Table) -> Source:
        """Rows of `table` picked in this way; a table without enough parents gets as many joins as it has."""
        witness = self.pick(self.database.rows[table.name])
        chain = self._chain(table, kind.joins)
        prefix = "T1." if len(chain) > 1 else ""
        columns = self.rng.sample(table.columns, min(kind.own, len(table.columns)))
        own = [self.condition(column, witness[column.name], prefix) for column in columns]
        words = [self.plural(table)]
        if own:
            words.append("with " + f" {kind.connector.lower()} ".join(text for text, _ in own))
        clauses = [f" {kind.connector} ".join(sql for _, sql in own)] if own else []
        if kind.far and len(chain) > 1:
            text, sql = self._far_condition(chain, witness)
            words.append(text)
            clauses.append(sql)
        parent = chain[1] if len(chain) > 1 else None
        return Source(table, " ".join(words), _joined(chain), " AND ".join(clauses), parent)

    def condition(self, column: Column, value: Value, prefix: str) -> tuple[str, str]:
        """A condition on a column, in words and in SQL, that a row with this value meets."""
        mention, name = self.mention(column), prefix + column.name
        if isinstance(value, int):
            return self._number_condition(column, value, mention, name)
        return self._word_condition(column, value, mention, name)

    def _chain(self, table: Table, joins: int) -> list[Table]:
        chain = [table]
        while len(chain) <= joins and chain[-1].parents:
            chain.append(self.parent_of(chain[-1]))
        return chain

    def _far_condition(self, chain: Sequence[Table], witness: Record) -> tuple[str, str]:
        for table in chain[1:]:
            key = witness[f"{table.name}_id"]
            assert isinstance(key, int)
            witness = self.database.rows[table.name][key - 1]
        column = self.pick(chain[-1].columns)
        text, sql = self.condition(column, witness[column.name], f"T{len(chain)}.")
        return f"whose {' '.join(table.name for table in chain[1:])} has {text}", sql

    def _operator(self, operators: Sequence[tuple[str, float, tuple[str, ...]]]) -> tuple[str, str]:
        operator, _, phrases = self.rng.choices(operators, [weight for _, weight, _ in operators])[0]
        return operator, self.pick(phrases)

    def _number_condition(self, column: Column, value: int, mention: str, name: str) -> tuple[str, str]:
        operator, phrase = self._operator(_NUMBER_OPERATORS)
        grid, place, last = column.grid, column.grid.index(value), len(column.grid) - 1
        if operator == "BETWEEN":
            first = self.rng.randint(0, min(place, last - 1))
            second = self.rng.randint(max(place, first + 1), last)
            between = f"{name} BETWEEN {grid[first]} AND {grid[second]}"
            return phrase.format(c=mention, a=grid[first], b=grid[second]), between
        places = {
            "=": (place, place),
            ">": (0, max(0, place - 1)),
            "<": (min(last, place + 1), last),
            ">=": (0, place),
            "<=": (place, last),
        }
        bound = grid[self.rng.randint(*places[operator])]
        return phrase.format(c=mention, a=bound), f"{name} {operator} {bound}"

    def _word_condition(self, column: Column, value: str, mention: str, name: str) -> tuple[str, str]:
        likes = _LIKE_OPERATORS if column.kind == "label" else ()
        operator, phrase = self._operator((*_WORD_OPERATORS, *likes))
        other = self.pick([word for word in column.pool if word != value])
        if operator.startswith("LIKE"):
            letters = {"LIKE {a}%": value[0], "LIKE %{a}": value[-1]}.get(operator, value[1])
            return phrase.format(c=mention, a=f"'{letters}'"), f"{name} LIKE '{operator[5:].format(a=letters)}'"
        if operator == "IN":
            pair = (value, other) if self.rng.random() < 0.5 else (other, value)
            return phrase.format(c=mention, a=f"'{pair[0]}'", b=f"'{pair[1]}'"), f"{name} IN ('{pair[0]}', '{pair[1]}')"
        word = value if operator == "=" else other
        return phrase.format(c=mention, a=f"'{word}'"), f"{name} {operator} '{word}'"


def _joined(chain: Sequence[Table]) -> str:
    if len(chain) == 1:
        return chain[0].name
    parts = [f"{chain[0].name} AS T1"]
    for index, table in enumerate(chain[1:], start=2):
        parts.append(f"JOIN {table.name} AS T{index} ON T{index - 1}.{table.name}_id = T{index}.id")
    return " ".join(parts)
