"""Random schemas for the `unseen` variant: a few hundred concepts, recombined into databases."""

from random import Random

from cllm.tasks.sql_schemas import CITIES, COLORS, LEVELS, PEOPLE, Column, Schema, Table, category, label, number, words

_TABLES = words(
    """actor airport album artist author bank band bridge broker cafe camera camp car castle chef choir client clinic
    club concert contract course court customer dancer dealer dentist department desk district doctor driver editor
    engine engineer event exam farm farmer festival film firm flight forest game garden guest guide harbor hospital
    hotel house island journal judge lake lawyer lesson loan machine manager market meal medal member mentor mine
    mission model motor mountain museum nurse office opera orchestra owner painter park partner patient pilot plane
    planet plant player poet port printer prison product program project race ranger recipe region report researcher
    resort restaurant river road robot room route sailor sale satellite scholar school scientist sensor shelter ship
    shop singer soldier song speaker stadium station store student studio supplier teacher team temple tenant
    theater ticket tower town trader trail train trainer truck vendor village visitor volunteer vote ward warehouse
    worker writer"""
)
_NUMBERS = words(
    """acres age altitude amount area attendance balance beds bonus budget calls capacity charge clicks cost credits
    crew days debt delay depth discount distance duration engines errors fans fee fines floor frequency fuel games gates
    goals grade growth guests height hours income interest laps length losses mass mileage minutes month output
    pages passengers points population power price profit quantity range rating rent revenue rooms rounds salary
    sales score seats share shots size speed stock strength target tax temperature tickets tips turnover value views
    visits volume votes voltage wage wealth weight width wins year"""
)
_CATEGORIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("city", CITIES),
    ("color", COLORS),
    ("risk", LEVELS),
    ("quality", ("poor", "fair", "good", "great")),
    ("country", ("france", "spain", "italy", "norway", "poland", "japan")),
    ("season", ("spring", "summer", "autumn", "winter")),
    ("status", ("open", "closed", "pending", "active")),
    ("gender", ("male", "female")),
    ("shift", ("day", "evening", "night")),
    ("material", ("wood", "steel", "glass", "stone", "paper")),
    ("genre", ("drama", "comedy", "crime", "horror", "poetry")),
    ("language", ("english", "french", "german", "spanish", "polish")),
    ("climate", ("dry", "wet", "cold", "mild", "hot")),
    ("payment", ("cash", "card", "check")),
    ("direction", ("north", "south", "east", "west")),
    ("weather", ("sun", "rain", "snow", "wind")),
    ("style", ("modern", "classic", "plain", "rustic")),
    ("sector", ("health", "energy", "media", "retail", "farming")),
    ("degree", ("bachelor", "master", "doctor")),
    ("subject", ("physics", "biology", "history", "music", "law")),
    ("metal", ("iron", "gold", "silver", "copper", "zinc")),
    ("animal", ("horse", "dog", "cat", "sheep", "goat")),
    ("fruit", ("apple", "pear", "plum", "grape", "lemon")),
    ("class", ("first", "second", "third")),
    ("shape", ("round", "square", "flat", "curved")),
    ("grade", ("alpha", "beta", "gamma", "delta")),
    ("platform", ("web", "mobile", "desktop", "console")),
    ("priority", ("urgent", "normal", "minor")),
    ("period", ("ancient", "medieval", "recent")),
    ("mood", ("happy", "calm", "angry", "sad")),
)
_LABELS = ("name", "title", "owner", "contact", "chief", "holder", "agent", "nickname")


def random_schema(name: str, rng: Random) -> Schema:
    """A schema of two to four related tables, each with a label, one to three numbers and up to two categories."""
    names = rng.sample(_TABLES, rng.randint(2, 4))
    tables = []
    for position, table in enumerate(names):
        # A chain or a star: every later table refers to an earlier one.
        parents = (rng.choice(names[:position]),) if position else ()
        tables.append(Table(table, _random_columns(rng), (f"{table}s",), parents, 70 if position else 16))
    return Schema(name, tuple(tables))


def _random_columns(rng: Random) -> tuple[Column, ...]:
    columns = [label(rng.choice(_LABELS), PEOPLE)]
    for word in rng.sample(_NUMBERS, rng.randint(1, 3)):
        low = rng.choice((1, 1, 10, 20))
        columns.append(number(word, low, low + rng.choice((9, 40, 80, 300))))
    taken = {column.name for column in columns}
    for word, pool in rng.sample(_CATEGORIES, rng.randint(0, 2)):
        if word not in taken:  # "grade" is both a number and a category
            columns.append(category(word, pool))
    return tuple(columns)
