"""Make requests for SQL queries, half of them ambiguous, as the paper's AmbigSQL does with Spider's.

    python tests/make_ambig_sql.py OUT.jsonl [--count 200] [--seed 0] [--without TRAIN.jsonl]

A request is complete, or has lost its condition, its column or its sort key. Then the assistant
asks for what is missing, the user gives it, and the query is that of the complete request. The
context is an SQL script, no longer than it must be: the tables that the query needs, and of the
first one four rows, two of which do not meet its condition. Of every conversation it is checked
that its query runs and finds rows, and that a guess at the ambiguous request finds others. None
begins as one of TRAIN.jsonl does. Everything is keyed by seed and number: a longer file begins with
the shorter one.
"""

import argparse
import random
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import exchange, execution_match, read_vertex_jsonl, write_jsonl  # noqa: E402

# ---------------------------------------------------------------------------------------------------------- the worlds


class World(NamedTuple):
    """The first table is what requests are about; the numbers in a column differ, so that any sort key orders rows."""

    rows: str  # how a request calls the rows of the first table
    tables: dict  # name -> (columns, rows)
    join: str  # how the first table meets the second; "" where there is one
    texts: dict  # how a request calls a column of text -> the column; the first is a row's name
    numbers: dict  # and a column of numbers


WORLDS = (
    World(
        "products",
        {"products": ("id INTEGER, name TEXT, category TEXT, price REAL, stock INTEGER", [
            (1, "kite", "toys", 12.5, 40), (2, "puzzle", "toys", 18.0, 25), (3, "kettle", "kitchen", 34.9, 12),
            (4, "pan", "kitchen", 27.5, 31), (5, "lamp", "office", 45.0, 8), (6, "stapler", "office", 9.9, 66),
            (7, "robot", "toys", 59.0, 5), (8, "mug", "kitchen", 7.5, 90)])},
        "", {"name": "name", "category": "category"}, {"price": "price", "stock": "stock"},
    ),
    World(
        "books",
        {"books": ("title TEXT, author_id INTEGER, genre TEXT, pages INTEGER, year INTEGER", [
            ("Northern Rain", 1, "novel", 312, 1998), ("The Quiet Loom", 2, "novel", 274, 2006),
            ("Bread and Salt", 3, "cooking", 188, 2011), ("A Map of Tides", 1, "travel", 240, 2003),
            ("Glass Harbour", 2, "crime", 356, 2015), ("Winter Soups", 3, "cooking", 150, 2018),
            ("The Last Ferry", 1, "crime", 298, 2009)]),
         "authors": ("id INTEGER, name TEXT, country TEXT", [
             (1, "Ida Berg", "Norway"), (2, "Luis Prado", "Spain"), (3, "Mei Tan", "Singapore")])},
        "books JOIN authors ON books.author_id = authors.id",
        {"title": "title", "genre": "genre", "author's name": "authors.name", "author's country": "authors.country"},
        {"number of pages": "pages", "year": "year"},
    ),
    World(
        "flights",
        {"flights": ("number TEXT, origin TEXT, destination TEXT, minutes INTEGER, seats INTEGER", [
            ("QA10", "Oslo", "Rome", 195, 180), ("QA11", "Rome", "Oslo", 200, 174), ("QC4", "Paris", "Rome", 125, 132),
            ("QB7", "Paris", "Chicago O'Hare", 540, 290), ("QB8", "Chicago O'Hare", "Paris", 480, 288),
            ("QC3", "Oslo", "Paris", 140, 120), ("QD1", "Lima", "Paris", 745, 310)])},
        "", {"number": "number", "origin": "origin", "destination": "destination"},
        {"duration in minutes": "minutes", "number of seats": "seats"},
    ),
    World(
        "employees",
        {"employees": ("name TEXT, department_id INTEGER, job TEXT, salary INTEGER, age INTEGER", [
            ("Ana", 1, "engineer", 5200, 34), ("Bo", 1, "engineer", 4800, 29), ("Chen", 2, "seller", 3900, 41),
            ("Dora", 2, "manager", 6100, 52), ("Emil", 3, "clerk", 3100, 23), ("Fay", 3, "manager", 5900, 47),
            ("Gus", 1, "tester", 4100, 38), ("Hana", 2, "seller", 3700, 26)]),
         "departments": ("id INTEGER, name TEXT, city TEXT", [
             (1, "research", "Bergen"), (2, "sales", "Porto"), (3, "finance", "Lyon")])},
        "employees JOIN departments ON employees.department_id = departments.id",
        {"name": "employees.name", "job": "job", "department": "departments.name", "city": "departments.city"},
        {"salary": "salary", "age": "age"},
    ),
    World(
        "sensors",
        {"sensors": ("code TEXT, room TEXT, status TEXT, temperature REAL, battery INTEGER", [
            ("s1", "attic", "ok", 24.5, 81), ("s2", "attic", "silent", 22.0, 7), ("s3", "cellar", "ok", 11.5, 64),
            ("s4", "cellar", "weak", 12.1, 19), ("s5", "hall", "ok", 19.8, 93), ("s6", "hall", "weak", 18.7, 23),
            ("s7", "garage", "silent", 9.4, 3)])},
        "", {"code": "code", "room": "room", "status": "status"},
        {"temperature": "temperature", "battery level": "battery"},
    ),
    World(
        "matches",
        {"matches": ("day TEXT, home TEXT, away TEXT, spectators INTEGER, goals INTEGER", [
            ("2024-03-02", "Lions", "Hawks", 5200, 3), ("2024-03-09", "Hawks", "Bears", 4100, 1),
            ("2024-03-16", "Bears", "Lions", 6350, 5), ("2024-03-23", "Lions", "Bears", 7000, 2),
            ("2024-03-30", "Hawks", "Lions", 3900, 0), ("2024-04-06", "Bears", "Hawks", 2800, 4)])},
        "", {"day": "day", "home team": "home", "away team": "away"},
        {"number of spectators": "spectators", "number of goals": "goals"},
    ),
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- the words

OPENINGS = ("Show me", "List", "Give me", "Please find", "I need", "Can you look up")  # the last makes a question
AGGREGATES = {"avg": ("average",), "max": ("highest", "maximum"), "min": ("lowest", "minimum"), "sum": ("total",)}
DIRECTIONS = {"": ("lowest first", "ascending"), " DESC": ("highest first", "descending")}
SOME = ("some of the {rows}", "certain {rows}", "the {rows} that matter")
ANYTHING = ("what I need", "something", "one detail")
COUNTS = ("How many of those {rows} are there?", "How many such {rows} are there?",
          "How many {rows} like that do we have?", "How many of the {rows} count?")  # fmt: skip
IN_ORDER = ("in order", "sorted", "ranked")
QUESTIONS = {  # what was taken away -> wordings of the question for it
    "condition": ("Which {rows} do you mean?", "What condition should the {rows} meet?", "Which ones count?"),
    "column": ("Which column of the {rows}?", "What would you like to know about the {rows}?", "Which column is it?"),
    "sort": ("By which column, and in which direction?", "What should the order be based on?", "Sorted by what?"),
}
REPLIES = ("{}.", "{}, please.", "I mean {}.")

# ---------------------------------------------------------------------------------------------------- the conversations


def quoted(value):
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def script_of(tables):
    lines = []
    for name, (columns, rows) in tables.items():
        values = ", ".join("(" + ", ".join(map(quoted, row)) + ")" for row in rows)
        lines += [f"CREATE TABLE {name} ({columns});", f"INSERT INTO {name} VALUES {values};"]
    return "\n".join(lines)


def draw_tables(world, query, guess, rng):
    """Of the first table four rows, of which the query's condition leaves out two, if it leaves out
    as many; the second table where the query or the guess needs it."""
    (first, (columns, rows)), *others = world.tables.items()
    source = query.partition(" FROM ")[2].partition(" ORDER BY ")[0]
    numbers = rows_found(script_of(world.tables), f"SELECT {first}.rowid FROM {source}")
    needed = [row for i, row in enumerate(rows, start=1) if (i,) in numbers]
    decoys = [row for row in rows if row not in needed]
    decoys = rng.sample(decoys, min(2, len(decoys)))
    needed = rng.sample(needed, min(4 - len(decoys), len(needed)))
    tables = {first: (columns, sorted(needed + decoys, key=rows.index))}
    return tables | {name: table for name, table in others if name in query + guess}


def query_of(world, select, test="", order=""):
    """A SELECT from the first table, joined with the second where an expression needs it."""
    first, *others = world.tables
    source = world.join if any(f"{name}." in select + test + order for name in others) else first
    return f"SELECT {select} FROM {source}" + (test and f" WHERE {test}") + (order and f" ORDER BY {order}")


def rows_found(script, query):
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(script)
        return database.execute(query).fetchall()


def draw_condition(world, script, rng, without):
    """(in words, in SQL) of a condition on a value that some row has, in another column than `without`."""
    is_text = rng.random() < 0.6
    columns = list(world.texts.items())[1:] if is_text else list(world.numbers.items())
    words, column = rng.choice([item for item in columns if item[1] not in without] or columns)
    [value] = rng.choice(rows_found(script, query_of(world, column)))
    if is_text:
        return rng.choice((f"whose {words} is {value}", f"with {value} as {words}")), f"{column} = {quoted(value)}"
    sign, name = rng.choice(((">", "above"), ("<", "below"), (">=", "at least")))
    return f"whose {words} is {name} {value}", f"{column} {sign} {value}"


def draw_request(world, rng):
    """(the whole request, its query, {what can be taken away: (the request without it, the user's reply, a guess)})."""
    script = script_of(world.tables)
    form = rng.choice(("list", "list", "sorted", "sorted", "count", "aggregate", "top"))
    words, column = rng.choice(list((world.texts | world.numbers).items()))
    number, value = rng.choice(list(world.numbers.items()))
    [other] = [each for each in world.numbers.values() if each != value]
    condition, test = draw_condition(world, script, rng, (column, value) if form != "count" else ())
    if form in ("sorted", "top") and rng.random() < 0.5:
        condition = test = ""
    opening, way, rows = rng.choice(OPENINGS), rng.choice(list(DIRECTIONS)), world.rows
    end = "?" if opening == OPENINGS[-1] else "."
    these, some = f"the {rows} {condition}".strip(), rng.choice(SOME).format(rows=rows)
    only = f"only those {condition}"

    if form == "list":
        return f"{opening} the {words} of {these}{end}", query_of(world, column, test), {
            "condition": (f"{opening} the {words} of {some}{end}", only, query_of(world, column)),
            "column": (f"{opening} {rng.choice(ANYTHING)} about {these}{end}", f"the {words}",
                       query_of(world, "*", test)),
        }  # fmt: skip
    if form == "sorted":
        asked, key = f"{opening} the {words} of {these}", f"by {number}, {rng.choice(DIRECTIONS[way])}"
        return f"{asked}, sorted {key}{end}", query_of(world, column, test, value + way), {
            "sort": (f"{asked}, {rng.choice(IN_ORDER)}{end}", key, query_of(world, column, test, column)),
        }  # fmt: skip
    if form == "count":
        return f"How many {rows} {condition} are there?", query_of(world, "count(*)", test), {
            "condition": (rng.choice(COUNTS).format(rows=rows), only, query_of(world, "count(*)")),
        }  # fmt: skip
    if form == "aggregate":
        function = rng.choice(list(AGGREGATES))
        name = rng.choice(AGGREGATES[function])
        select, guess = f"{function}({value})", f"{function}({other})"
        return f"What is the {name} {number} of {these}?", query_of(world, select, test), {
            "condition": (f"What is the {name} {number} of {some}?", only, query_of(world, select)),
            "column": (f"What is the {name} of {these}?", f"the {number}", query_of(world, guess, test)),
        }  # fmt: skip
    label, name = next(iter(world.texts.items()))
    asked = f"{opening} the {label} of the first of {these}"
    key = f"by {number}, {rng.choice(DIRECTIONS[way])}"
    return f"{asked}, sorted {key}{end}", query_of(world, name, test, f"{value}{way} LIMIT 1"), {
        "sort": (f"{asked}{end}", key, query_of(world, name, test, f"{other}{way} LIMIT 1")),
    }  # fmt: skip


def make_conversation(rng, known=()):
    """A conversation in the messages form; drawn again until its query finds rows, a guess finds
    others, and its request is not among those known."""
    ambiguous = rng.random() < 0.5
    while True:
        world = rng.choice(WORLDS)
        whole, query, taken = draw_request(world, rng)
        kind = rng.choice(list(taken))
        vague, reply, guess = taken[kind]
        script = script_of(draw_tables(world, query, guess, rng))
        request = vague if ambiguous else whole
        finds = any(value is not None for row in rows_found(script, query) for value in row)
        apart = finds and execution_match(guess, query, script) == (0.0, 0.0)
        if apart and request not in known:
            break
    assert execution_match(query, query, script) == (1.0, 1.0), query
    messages = [{"role": "system", "content": script}]
    if ambiguous:
        question = rng.choice(QUESTIONS[kind]).format(rows=world.rows)
        messages += exchange(vague, question, clarify=True)
        reply = rng.choice(REPLIES).format(reply)
        request = reply[0].upper() + reply[1:]
    return {"messages": messages + exchange(request, query)}


def requests_of(conversations):
    """What the conversations begin with."""
    return {conversation["messages"][1]["content"] for conversation in conversations}


def make(count, seed=0, known=()):
    """That many conversations, none of which begins with a request among those known."""
    return [make_conversation(random.Random(f"{seed}/{n}"), known) for n in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", help="the JSONL file to write")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", metavar="FILE", help="make no request of this file again")
    given = parser.parse_args()
    known = requests_of(read_vertex_jsonl(given.without)) if given.without else ()
    conversations = make(given.count, given.seed, known)
    write_jsonl(given.target, conversations)
    vague = sum(len(conversation["messages"]) == 5 for conversation in conversations)
    count, different = len(conversations), len(requests_of(conversations))
    print(f"{given.target}: {count} conversations, {vague} ambiguous, {different} requests")
