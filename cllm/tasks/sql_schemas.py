"""Schemas of generated databases: what a table may hold, and the six databases of the `shared` variant."""

from dataclasses import dataclass
from typing import Literal

ColumnKind = Literal["number", "category", "label"]


def words(text: str) -> tuple[str, ...]:
    """The words of a text: lists of words read better that way."""
    return tuple(text.split())


PEOPLE = words(
    "anna ben carla david emma frank grace henry irene jack karen louis maria nora oscar paula robert sara tom vera"
)
CITIES = words("paris london madrid berlin rome oslo vienna dublin")
LEVELS = ("low", "medium", "high")
COLORS = words("red blue green black white yellow")


@dataclass(frozen=True, slots=True)
class Column:
    """A data column.

    Attributes:
        kind: number (an integer of a round grid, see `grid`), category (a few words, each common) or label (what names
            a row).
        low, high: bounds of a number, inclusive.
        pool: words of a category or label.
        mentions: how questions call it, its name first.
    """

    name: str
    kind: ColumnKind
    low: int = 0
    high: int = 0
    pool: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()

    @property
    def grid(self) -> range:
        """The values that a number takes, in the table and in questions: about twenty at most, and round ones.

        People ask about round numbers; besides, a small model learns to copy few numbers much sooner than many.
        """
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (self.high - self.low) // step <= 20)
        first = -(-self.low // step) * step
        return range(first, self.high + 1, step)


@dataclass(frozen=True, slots=True)
class Table:
    """A table: a key `id`, the data columns, and a foreign key `<parent>_id` for every parent.

    Attributes:
        plurals: how questions call its rows.
        parents: names of the tables referred to; each stands before this one in its schema.
        num_rows: rows to generate.
    """

    name: str
    columns: tuple[Column, ...]
    plurals: tuple[str, ...]
    parents: tuple[str, ...] = ()
    num_rows: int = 90

    def of_kind(self, *kinds: ColumnKind) -> tuple[Column, ...]:
        """The data columns of these kinds, in order."""
        return tuple(column for column in self.columns if column.kind in kinds)

    @property
    def column_names(self) -> tuple[str, ...]:
        """All columns as SQL knows them: key, data, foreign keys."""
        return ("id", *(column.name for column in self.columns), *(f"{parent}_id" for parent in self.parents))


@dataclass(frozen=True, slots=True)
class Schema:
    """A database's tables, parents before children."""

    name: str
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """The table of this name, which must exist."""
        return next(table for table in self.tables if table.name == name)

    def linearised(self) -> str:
        """One line for a prompt: `table: col, col | table: ...`."""
        return " | ".join(f"{table.name}: {', '.join(table.column_names)}" for table in self.tables)


def number(name: str, low: int, high: int, *synonyms: str) -> Column:
    """A column of integers, uniform over [low, high]."""
    return Column(name, "number", low=low, high=high, mentions=(name, *synonyms))


def category(name: str, pool: tuple[str, ...], *synonyms: str) -> Column:
    """A column of a few recurring words."""
    return Column(name, "category", pool=pool, mentions=(name, *synonyms))


def label(name: str, pool: tuple[str, ...], *synonyms: str) -> Column:
    """A column that names the rows; unlike a category it is never grouped by."""
    return Column(name, "label", pool=pool, mentions=(name, *synonyms))


def shared_schemas() -> tuple[Schema, ...]:
    """The databases that all splits of the `shared` variant use."""
    return (_hospital(), _school(), _shop(), _airline(), _library(), _league())


def _hospital() -> Schema:
    places = words("north south east west central lake hill park river garden harbor forest")
    ward = Table("ward", (label("name", places), number("floor", 1, 9), number("beds", 10, 60)), ("wards",), (), 12)
    nurse = Table(
        "nurse",
        (
            label("name", PEOPLE),
            number("age", 20, 65),
            number("salary", 20, 99, "pay"),
            category("shift", ("day", "evening", "night")),
        ),
        ("nurses",),
        ("ward",),
    )
    patient = Table(
        "patient",
        (label("name", PEOPLE), number("age", 1, 95), number("days", 1, 60), category("risk", LEVELS)),
        ("patients",),
        ("ward",),
    )
    return Schema("hospital", (ward, nurse, patient))


def _school() -> Schema:
    titles = words("algebra music biology history physics drama english art logic law greek latin")
    teacher = Table(
        "teacher",
        (label("name", PEOPLE), number("age", 25, 68), number("salary", 20, 99, "pay"), category("city", CITIES)),
        ("teachers",),
        (),
        18,
    )
    course = Table(
        "course",
        (label("title", titles), number("credits", 1, 12), number("hours", 10, 90), category("level", LEVELS)),
        ("courses", "classes"),
        ("teacher",),
        30,
    )
    student = Table(
        "student",
        (label("name", PEOPLE), number("age", 15, 30), number("grade", 1, 100, "mark"), category("city", CITIES)),
        ("students",),
        ("course",),
    )
    return Schema("school", (teacher, course, student))


def _shop() -> Schema:
    firms = words("acme orion delta nova zenith apex vega titan atlas omega luna terra")
    goods = words("chair table lamp desk shelf sofa clock mirror carpet vase stool bench")
    supplier = Table(
        "supplier", (label("name", firms), number("rating", 1, 50), category("city", CITIES)), ("suppliers",), (), 12
    )
    product = Table(
        "product",
        (
            label("name", goods),
            number("price", 1, 199, "cost"),
            number("stock", 1, 99),
            category("color", COLORS),
        ),
        ("products", "items"),
        ("supplier",),
        40,
    )
    sale = Table(
        "sale",
        (
            label("buyer", PEOPLE),
            number("amount", 1, 40, "quantity"),
            number("month", 1, 12),
            category("payment", ("cash", "card", "check")),
        ),
        ("sales",),
        ("product",),
    )
    return Schema("shop", (supplier, product, sale))


def _airline() -> Schema:
    models = words("falcon eagle swift hawk raven condor")
    airport = Table("airport", (category("city", CITIES), number("gates", 5, 80)), ("airports",), (), 12)
    plane = Table(
        "plane",
        (category("model", models, "type"), number("seats", 40, 400), number("age", 1, 30)),
        ("planes",),
        (),
        20,
    )
    flight = Table(
        "flight",
        (
            label("pilot", PEOPLE),
            number("distance", 100, 900, "length"),
            number("delay", 1, 120),
            category("status", ("early", "late", "open", "full")),
        ),
        ("flights",),
        ("airport", "plane"),
        100,
    )
    return Schema("airline", (airport, plane, flight))


def _library() -> Schema:
    titles = words("dawn storm winter summer ocean desert island mountain mirror garden river shadow")
    genres = ("drama", "crime", "poetry", "travel", "history")
    author = Table(
        "author", (label("name", PEOPLE), number("age", 25, 90), category("city", CITIES)), ("authors",), (), 16
    )
    book = Table(
        "book",
        (label("title", titles), number("pages", 50, 900), number("rating", 1, 50), category("genre", genres, "kind")),
        ("books",),
        ("author",),
        50,
    )
    loan = Table(
        "loan",
        (
            label("reader", PEOPLE),
            number("days", 1, 60),
            number("fee", 1, 99),
            category("month", ("may", "june", "july")),
        ),
        ("loans",),
        ("book",),
    )
    return Schema("library", (author, book, loan))


def _league() -> Schema:
    clubs = words("lions tigers bears wolves hawks eagles sharks bulls foxes ravens")
    weather = ("sun", "rain", "snow", "wind")
    club = Table(
        "club", (label("name", clubs), number("budget", 10, 200), category("city", CITIES)), ("clubs", "teams"), (), 10
    )
    player = Table(
        "player",
        (
            label("name", PEOPLE),
            number("age", 17, 40),
            number("goals", 1, 50),
            category("position", ("keeper", "defender", "striker"), "role"),
        ),
        ("players",),
        ("club",),
    )
    game = Table(
        "game",
        (
            label("referee", PEOPLE),
            number("crowd", 100, 900, "attendance"),
            number("score", 1, 9),
            category("weather", weather),
        ),
        ("games", "matches"),
        ("club",),
        80,
    )
    return Schema("league", (club, player, game))
