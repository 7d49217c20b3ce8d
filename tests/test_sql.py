"""Text-to-SQL: scores of queries, predictions that attack whoever runs them, Spider's files and the made AmbigSQL."""

import itertools
import json
import resource
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import data
from data import InputError, execution_match, scored
from tests.make_ambig_sql import WORLDS, make

SHOP = """CREATE TABLE items (name TEXT, price REAL, stock INTEGER);
INSERT INTO items VALUES ('kite', 12.5, 3), ('lamp', 40, 1), ('mug', 7.5, NULL), ('O''Hara', 7.5, 3);
CREATE TABLE big (a INTEGER, s TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)
INSERT INTO big SELECT i, 'row number ' || i FROM n;
CREATE TABLE empty (a);"""
LONG = f"replace('{'a' * 190}', 'a', '{'a' * 100}')"  # nearly as long as a string may get
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
RIGHT, SAME_ROWS, WRONG = (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)


@pytest.mark.parametrize(("predicted", "gold", "want"), [
    ("SELECT name FROM items", "SELECT name FROM items", RIGHT),
    (" select NAME\n from Items ; ", "SELECT name FROM items", RIGHT),
    ("Here it is:\n```sql\nSELECT name FROM items;\n```\nDone.", "SELECT name FROM items", RIGHT),
    ("```postgresql\nSELECT name FROM items\n```", "SELECT name FROM items", RIGHT),
    ("```\nSELECT name FROM items\n```", "```SQL\nSELECT name\nFROM items```", RIGHT),
    ("SELECT name AS n FROM items ORDER BY price", "SELECT name FROM items", SAME_ROWS),
    ("SELECT name FROM items -- all", "SELECT name FROM items", SAME_ROWS),
    ("SELECT name FROM items", "SELECT name FROM items ORDER BY lower(name)", SAME_ROWS),  # that order, by chance
    ("SELECT name FROM items", "SELECT name FROM items ORDER BY name DESC", WRONG),
    ("SELECT name FROM items", "SELECT name FROM items ORDER BY lower(trim(name)) DESC", WRONG),
    ("SELECT name FROM items", "SELECT name FROM (SELECT name FROM items ORDER BY lower(trim(name)) DESC)", SAME_ROWS),
    ("SELECT name FROM items", "-- Which ones?\nSELECT name FROM items", SAME_ROWS),
    ("SELECT name FROM items", "SELECT name FROM (SELECT name FROM items ORDER BY name DESC)", SAME_ROWS),
    ("SELECT name FROM items ORDER BY 1 DESC", "SELECT name FROM items WHERE name <> ') order by ('", SAME_ROWS),
    ("SELECT name FROM items ORDER BY 1 DESC", "SELECT name FROM items /* ( order by */ -- order by", SAME_ROWS),
    ("SELECT name FROM items ORDER BY 1", "SELECT name, row_number() OVER (ORDER BY name) FROM items", WRONG),
    ("SELECT 1.0", "SELECT 1", SAME_ROWS),
    ("SELECT '1'", "SELECT 1", WRONG),
    ("SELECT x'61'", "SELECT 'a'", WRONG),
    ("SELECT NULL", "SELECT ''", WRONG),
    ("SELECT 0.1 + 0.2", "SELECT 0.3", SAME_ROWS),
    ("SELECT 0.3001", "SELECT 0.3", WRONG),
    ("SELECT price FROM items WHERE stock = 3 OR stock IS NULL", "SELECT price FROM items WHERE price < 40", SAME_ROWS),
    ("SELECT DISTINCT price FROM items", "SELECT price FROM items", WRONG),  # rows are counted
    ("SELECT price FROM items UNION ALL SELECT 40", "SELECT price FROM items", WRONG),
    ("SELECT price, name FROM items", "SELECT name, price FROM items", WRONG),
    ("SELECT name, price FROM items", "SELECT name FROM items", WRONG),
    ("SELECT a FROM empty", "SELECT name FROM items WHERE price > 99", SAME_ROWS),
    ("SELECT name FROM items WHERE name = 'KITE'", "SELECT name FROM items WHERE name = 'kite'", WRONG),
    ("WITH x AS (SELECT max(price) p FROM items) SELECT name FROM items, x WHERE price = p",
     "SELECT name FROM items ORDER BY price DESC LIMIT 1", SAME_ROWS),
    ("SELECT strftime('%Y', '2024-05-06'), substr('abc', 2), round(2.345, 1), 'a' LIKE 'A', cast('7' AS INTEGER)",
     "SELECT '2024', 'bc', 2.3, 1, 7", SAME_ROWS),
    ("Which  items do you mean?", "Which items do you mean?", RIGHT),
    ("SELECT name FROM items", "Which items do you mean?", WRONG),
    ("Which items?", "SELECT name FROM items", WRONG),
    ("SELECT name FROM items WHERE name = 'O''Hara'", "SELECT name FROM items WHERE name LIKE 'O%'", SAME_ROWS),
    ("SELECT i.name FROM items i WHERE i.name = 'ok?'", "SELECT name FROM items WHERE name = 'ok?'", SAME_ROWS),
    ("SELECT name FROM items", "with x as (select 1) select * from x where 1 <> 'ok?'", WRONG),  # a query, no question
])  # fmt: skip
def test_execution_match_by_hand(predicted, gold, want):
    assert execution_match(predicted, gold, SHOP) == want


@pytest.mark.parametrize(("gold", "context", "problem"), [
    ("SELECT nope FROM items", SHOP, "the gold query 'SELECT nope FROM items' fails: no such column: nope"),
    ("SELECT name\nFROM", SHOP, "the gold query 'SELECT name FROM' fails: incomplete input"),
    ("", SHOP, "the gold query '' fails: no query, or too long"),
    ("DELETE FROM items", SHOP, "the gold query 'DELETE FROM items' fails: not authorized"),
    ("SELECT 1; SELECT 2", SHOP, "the gold query 'SELECT 1; SELECT 2' fails: You can only execute one statement at a"),
    ("SELECT 1", "CREATE TABLE", "the context 'CREATE TABLE' fails: incomplete input"),
    ("SELECT 1", "Sales 2018: 5.", "the context 'Sales 2018: 5.' fails: near"),
    ("SELECT 1", "SELECT '\ud800'", "fails: 'utf-8' codec can't encode"),
    ("SELECT 1", "SELECT 1\0", "fails: embedded null character"),
    ("SELECT 1", "ATTACH 'other.db' AS o", "fails: too many attached databases"),
    ("SELECT 1", "CREATE TABLE t (a); VACUUM INTO 'other.db'", "fails: "),
    ("SELECT 1", "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i) FROM n", "interrupted"),
    ("SELECT 1", "CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(900000000))", "fails: not authorized to use func"),
    ("SELECT 1", f"CREATE TABLE t AS {ENDLESS} SELECT i FROM n", "fails: "),
    ("SELECT 1", f"CREATE TABLE t AS SELECT {LONG} || {LONG}", "fails: string or blob too big"),
    ("SELECT 1", f"CREATE TABLE t AS SELECT '{'a' * 20_001}'", "fails: string or blob too big"),
])  # fmt: skip
def test_a_broken_gold_query_or_context_is_an_input_error(gold, context, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        execution_match("SELECT 1", gold, context)
    assert str(caught.value).startswith("execution_match: ") and problem in str(caught.value)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_every_heuristic_takes_a_context_and_may_return_a_number():
    for heuristic in data.HEURISTICS.values():
        assert scored(heuristic, "SELECT 1", "SELECT 1", "") == RIGHT
    assert scored(execution_match, "SELECT stock FROM items", "SELECT stock + 0 FROM items", SHOP) == SAME_ROWS
    assert scored(lambda predicted, gold, context: len(context), "A  b", "a b", "xyz") == (1.0, 3.0)
    assert scored(lambda predicted, gold, context: predicted == gold, "a", "b") == (0.0, 0.0)
    with pytest.raises(InputError, match="no such table: items"):
        execution_match("SELECT 1", "SELECT name FROM items")


# ------------------------------------------------------------------------------------------------- hostile predictions

HALF = f"replace('{'a' * 95}', 'a', '{'a' * 100}')"
THREE = "FROM big a, big b, big c"
FOUR = f"{THREE}, big d"


def doubled(times, first, step):
    """Tables that each use the one before twice: what is planned grows as a power of two."""
    steps = [f"c{i} AS ({step.replace('@', f'c{i - 1}')})" for i in range(1, times + 1)]
    return f"WITH c0 AS ({first}), {', '.join(steps)} SELECT 1 FROM c{times}"


def nested(before, after, times, inside="1"):
    return f"SELECT {before * times}{inside}{after * times}"


def joined(count, test=""):
    return f"SELECT count(*) FROM {', '.join(f'big b{i}' for i in range(count))}{test}"


TWICE = "SELECT 1 FROM @ x, @ y"
CHAIN = " ".join(f"LEFT JOIN big b{i} ON b{i}.a = b{i - 1}.a OR b{i}.s = b0.s" for i in range(1, 63))
CLIQUE = " AND ".join(f"b{i}.a = b{j}.a" for i in range(60) for j in range(i) if (i + j) % 4 == 0)[:9000]
CHOICES = " AND ".join(f"b{i}.a IN (b{i * 7 % 40}.a, b{(i * 11 + 1) % 40}.a, 1, 2)" for i in range(40))
SUMS = ", ".join(f"a.a % {i + 2} + b.a" for i in range(90))

ATTACKS = {
    "writes": [
        "INSERT INTO items VALUES (1, 2, 3)", "UPDATE items SET price = 0", "DELETE FROM items", "DROP TABLE items",
        "CREATE TABLE n AS SELECT 1", "DELETE FROM items RETURNING name", "WITH x AS (SELECT 1) DELETE FROM items",
        "ALTER TABLE items RENAME TO other", "CREATE TEMP VIEW v AS SELECT 1", "CREATE VIRTUAL TABLE v USING fts5(x)",
        "CREATE TEMP TRIGGER t AFTER INSERT ON items BEGIN SELECT 1; END", "UPDATE sqlite_master SET sql = 'x'",
        "REPLACE INTO items VALUES (1, 2, 3)", "BEGIN", "BEGIN EXCLUSIVE", "SAVEPOINT x", "ANALYZE", "REINDEX"],
    "files and settings": [
        "ATTACH 'attached.db' AS x", "ATTACH ':memory:' AS x", "DETACH main", "VACUUM", "VACUUM INTO 'copy.db'",
        "PRAGMA user_version = 3", "PRAGMA table_info(items)", "PRAGMA hard_heap_limit = 1000", "PRAGMA empty",
        "SELECT * FROM pragma_hard_heap_limit(1000)", "SELECT name FROM pragma_table_info('items')",
        "SELECT load_extension('./x.so')", "SELECT writefile('w', 'x')", "SELECT readfile('/etc/passwd')",
        "SELECT edit('x')", "SELECT fts3_tokenizer('simple')", "SELECT * FROM dbstat", "EXPLAIN SELECT 1",
        "SELECT sqlite_log(1, 'x')", "SELECT random()", "SELECT changes()", "SELECT last_insert_rowid()"],
    "endless": [
        f"{ENDLESS} SELECT count(*) FROM n", f"{ENDLESS} SELECT i FROM n", f"{ENDLESS} SELECT i FROM n ORDER BY -i",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n",
        "WITH RECURSIVE n(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM n) SELECT length(s) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + x.a FROM n, big x) SELECT count(*) FROM n",
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n ORDER BY 1) SELECT {LONG} || i FROM n"],
    "joins": [
        f"SELECT count(*) {FOUR}", f"SELECT * {FOUR}", f"SELECT DISTINCT a.s || b.s || c.s {THREE}",
        f"SELECT a.s || b.s {THREE} ORDER BY 1 DESC", f"SELECT {LONG} || (a.a + b.a) FROM big a, big b ORDER BY 1",
        f"SELECT count(DISTINCT {LONG} || (a.a + 1000 * b.a + 1000000 * c.a)) {THREE}",
        f"SELECT a.s, b.s, c.s, count(*) {THREE} GROUP BY 1, 2, 3", f"SELECT count(*) {THREE} GROUP BY {SUMS}",
        f"SELECT a.a {THREE} ORDER BY {SUMS}", f"SELECT * {THREE} UNION SELECT * {THREE}",
        f"SELECT sum(a.a) OVER (ORDER BY b.a ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) {THREE}",
        f"SELECT max(a.a) OVER (ORDER BY b.a ROWS BETWEEN 90000 PRECEDING AND 90000 FOLLOWING EXCLUDE TIES) {THREE}",
        f"SELECT group_concat(a.s) OVER (ORDER BY b.a ROWS BETWEEN 500 PRECEDING AND 1 PRECEDING) {THREE}",
        "SELECT count(*) FROM big z WHERE NOT EXISTS (SELECT 1 FROM big x, big y, big w WHERE x.a + y.a = -w.a - z.a)",
        "SELECT (SELECT count(*) FROM big x, big y WHERE x.a + y.a + z.a > 0) FROM big z, big w",
        "SELECT count(*) FROM " + " NATURAL JOIN ".join(f"big b{i}" for i in range(60)), joined(64), joined(200)],
    "long strings": [
        "SELECT randomblob(100000000)", "SELECT zeroblob(1000000000)", "SELECT hex(zeroblob(500000000))",
        "SELECT quote(zeroblob(500000000))", "SELECT printf('%1000000000d', 1)", "SELECT format('%1000000000d', 1)",
        "SELECT printf('%.1000000000f', 1.5)", "SELECT printf('%.*c', 1000000000, 'x')",
        "SELECT printf('%.2147483647c', 'x')", f"SELECT {LONG} || {LONG}", f"SELECT replace({LONG}, 'a', {LONG})",
        f"WITH a AS (SELECT {LONG} s), b AS (SELECT s || s s FROM a), c AS (SELECT s || s s FROM b) SELECT s FROM c",
        f"SELECT group_concat(a.s) {THREE}", f"SELECT group_concat(a.s, {LONG}) FROM big a, big b",
        nested("replace(", ", 'x', 'xxxxxxxx')", 30, "'xx'"), "SELECT json_group_array(s) FROM big",
        "SELECT length(strftime('" + "%Y-%m-%d %H:%M:%f" * 400 + "', 'now'))", f"SELECT {LONG} {THREE}"],
    "slow steps": [
        f"SELECT sum(instr({LONG}, {HALF} || a.a)) FROM big a, big b",
        f"SELECT sum(length(replace(x, y || a.a, 'q'))) FROM (SELECT {LONG} x, {HALF} y), big a, big b",
        f"SELECT sum(length(trim({LONG}, {LONG} || a.a))) FROM big a, big b",
        f"SELECT sum(length(trim(x, y||a.a))) FROM (SELECT {LONG} x, replace({HALF}, 'a', 'bc')||'a' y), big a, big b",
        f"SELECT sum(length(upper(lower(upper({LONG} || a.a))))) {THREE}", f"SELECT sum(cast({LONG} AS REAL)) {THREE}",
        f"SELECT count(*) FROM (SELECT {LONG} x), big a, big b WHERE x LIKE '{'%_' * 90}q'",
        f"SELECT count(*) FROM (SELECT {LONG} x), big a, big b WHERE x LIKE '{'%a' * 95}q'",
        f"SELECT count(*) FROM (SELECT {LONG} x), big a, big b WHERE x LIKE '{'%!a' * 60}q' ESCAPE '!'",
        f"SELECT count(*) FROM (SELECT {LONG} x), big a, big b WHERE x GLOB '{'*?' * 90}q'",
        f"SELECT count(*) FROM (SELECT {LONG} x), big a, big b WHERE x GLOB '{'*[a-z]' * 33}q'",
        f"SELECT '{'a' * 8000}' LIKE '{'%a' * 800}b'", "SELECT date('now', " + ", ".join(["'+1 day'"] * 120) + ")",
        "SELECT name FROM items WHERE name REGEXP '(a+)+$'", "SELECT name FROM items WHERE name MATCH 'x'"],
    "deep": [
        nested("(", ")", 4000), nested("- ", "", 4900), nested("NOT ", "", 2400), nested("abs(", ")", 1900),
        nested("CASE WHEN 1 THEN ", " END", 300), nested("EXISTS(SELECT ", ")", 600), nested("1 AND ", "", 1500),
        nested("* FROM (SELECT ", ")", 500), "SELECT x FROM " + "(SELECT x+x x FROM " * 30 + "items" + ")" * 30,
        "SELECT x FROM " + "(SELECT x||x||x||x x FROM " * 30 + "(SELECT name x FROM items)" + ") WHERE x > 'a'" * 30,
        f"SELECT count(*) FROM json_tree('{'[' * 4000}{']' * 4000}') a, json_tree('[[[[]]]]') b, big"],
    "wide": [
        "SELECT name FROM items WHERE price IN (" + ", ".join(map(str, range(2_000_000))) + ")",
        "SELECT " + ", ".join(["1"] * 3000), "SELECT " + ", ".join(["*"] * 3000) + " FROM big",
        "SELECT * FROM " + ", ".join(f"items t{i}" for i in range(63)), "VALUES " + ", ".join(["(1)"] * 1600),
        " UNION ALL ".join(["SELECT 1"] * 500), "SELECT * FROM items WHERE " + " OR ".join(["stock = 9"] * 700),
        f"SELECT count(*) FROM big b0 {CHAIN}", joined(60, f" WHERE {CLIQUE.rpartition(' AND ')[0]}"),
        joined(40, f" WHERE {CHOICES} AND (" + " OR ".join(f"b{i}.a = b{(i + 1) % 40}.a" for i in range(40)) + ")"),
        joined(2, " WHERE " + " OR ".join(f"b0.a = b1.a + {i}" for i in range(90))),
        "SELECT count(*) FROM big " + " ".join(f"JOIN big b{i} USING (a, s)" for i in range(1, 63)),
        "SELECT " + ", ".join(f"sum(a) OVER (PARTITION BY {i} ORDER BY a)" for i in range(90)) + " FROM big"],
    "planning": [
        *(doubled(times, "SELECT a FROM big", TWICE) for times in (8, 14, 40)),
        *(doubled(times, "SELECT 1", TWICE) for times in (13, 40)),
        *(doubled(times, "SELECT 1", "SELECT (SELECT 1 FROM @) + (SELECT 2 FROM @)") for times in (13, 40)),
        *(doubled(times, "SELECT 1", "SELECT * FROM @ UNION ALL SELECT * FROM @") for times in (13, 40)),
        doubled(13, "SELECT 1", "SELECT * FROM @ UNION SELECT * FROM @"),
        doubled(20, "SELECT * FROM items", "SELECT * FROM @ x, @ y"),
        doubled(13, "SELECT 1 q", "SELECT 1 q FROM big WHERE EXISTS(SELECT 1 FROM @ WHERE q = a) OR a IN @"),
        doubled(4, "SELECT 1", "SELECT 1 FROM " + ", ".join(f"@ x{i}" for i in range(60)))],
    "no query": [
        "", " \n ", ";", "-- nothing", "/* SELECT", "SELECT '" + "'" * 4000 + "a", "SELECT ?1, :x, @y", "SELECT ?32766",
        "SELECT nope", "I think it is 5.", "x" * 20_000_000, "```sql " * 1400, "```" * 3300, "SELECT RAISE(ABORT, 'x')",
        "SELECT 1; SELECT 2", "SELECT a FROM empty; DROP TABLE items", "SELECT a FROM empty\0", "\0", "SELECT '\ud800'",
        "\udfff", "SELECT CAST(x'ff' AS TEXT)", "SELECT 1 COLLATE nosuch", "SELECT abs(-9223372036854775808)",
        "SELECT sum(9223372036854775807) FROM big"],
}  # fmt: skip
CASES = [(group, number) for group, queries in ATTACKS.items() for number in range(len(queries))]
SCRIPTS = {  # what a context may be, and what fails in it: a gold query, which may take as long again
    **{f"{group} {n}": f"{SHOP} CREATE TABLE made AS {query}" for group in ("endless", "joins", "long strings", "slow steps")
       for n, query in enumerate(ATTACKS[group])},
    **{f"planning {n}": f"{SHOP} CREATE TABLE made AS {query}" for n, query in enumerate(ATTACKS["planning"])},
    "many rows": f"{SHOP} INSERT INTO big SELECT a.a, {LONG} {THREE}",
    "index": f"{SHOP} CREATE TABLE t AS SELECT a.a + b.a AS x FROM big a, big b; CREATE INDEX i ON t (x, x + 1, x + 2)",
    "view": f"{SHOP} CREATE VIEW v AS {ENDLESS} SELECT i FROM n; SELECT count(*) FROM v",
    "trigger": f"{SHOP} CREATE TRIGGER r AFTER INSERT ON empty BEGIN INSERT INTO empty SELECT a.a {FOUR}; END; "
               "INSERT INTO empty VALUES (1)",
}  # fmt: skip


def attack():
    """Runs every attack in this process, which may write no file, and prints what each scored and took, as JSON."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    data.SQL_SECONDS /= 5  # the bound that they run into, five times as fast as in earnest
    execution_match("SELECT 1", "SELECT 1", SHOP)
    taken = []
    calls = [(ATTACKS[group][number], SHOP) for group, number in CASES] + [("SELECT 1", script) for script in SCRIPTS.values()]
    for predicted, context in calls:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, start, clock = status("VmRSS"), time.thread_time(), time.monotonic()
        try:
            score = execution_match(predicted, "SELECT a FROM empty", context)
        except InputError as error:
            score = str(error)
        taken.append((score, time.thread_time() - start, time.monotonic() - clock, status("VmHWM") - before))
    print(json.dumps(taken))


def status(key):
    """MiB, as the kernel counts them."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """(group, number), or a name of SCRIPTS -> (score or error, seconds of processor time, seconds, MiB)."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    folder, root = tmp_path_factory.mktemp("attacked"), Path(__file__).resolve().parent.parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}]; from tests.test_sql import attack; attack()"
    environment = {"SQLITE_TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and not list(folder.iterdir())
    return dict(zip([*CASES, *SCRIPTS], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("group", "number"), CASES)
def test_hostile_predictions_score_nothing_and_take_little(attacked, group, number):
    score, processor, _, memory = attacked[group, number]
    assert score == [0.0, 0.0]
    assert processor < 0.5 and memory < 100, "0.1 s, and what one step may take that nothing interrupts"


@pytest.mark.parametrize("name", SCRIPTS)
def test_hostile_contexts_take_as_little(attacked, name):
    """Most fail; a few make a small table in time."""
    score, processor, _, memory = attacked[name]
    assert score == [0.0, 0.0] or score.startswith("execution_match: the ") and "\n" not in score
    assert processor < 0.7 and memory < 100, "0.1 s for the context, and for the gold query, and a step each"


def test_hostile_predictions_leave_sqlite_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(sqlite3.connect(":memory:")) as other:  # another user of sqlite in this process
        execution_match("SELECT 1", "SELECT 1")
        limit = other.execute("PRAGMA hard_heap_limit").fetchone()
        for query in ATTACKS["writes"] + ATTACKS["files and settings"]:
            assert execution_match(query, "SELECT name FROM items", SHOP) == WRONG
            assert execution_match("SELECT count(*) FROM items", "SELECT 4", SHOP) == SAME_ROWS
        assert other.execute("PRAGMA hard_heap_limit").fetchone() == limit and not list(tmp_path.iterdir())
        other.execute("CREATE TABLE t AS SELECT hex(randomblob(200000)) a")  # no limit of ours, no authorizer
        assert other.execute("SELECT length(a) FROM t").fetchone() == (400_000,)


# -------------------------------------------------------------------------------------------------------------- Spider


def convert(folder, *arguments):
    command = [sys.executable, Path(data.__file__), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def spider(tmp_path):
    """A folder with q.json and db/: three databases."""
    for name in ("zoo", "shop", "club"):
        (tmp_path / "db" / name).mkdir(parents=True)
    with closing(sqlite3.connect(tmp_path / "db/zoo/zoo.sqlite")) as database:
        database.executescript("""CREATE TABLE "Big cats" (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, face BLOB);
            CREATE TABLE food (cat INTEGER REFERENCES "Big cats" (id), kilos REAL);
            CREATE INDEX i ON food (cat); CREATE VIEW v AS SELECT 1;
            INSERT INTO "Big cats" (name, face) VALUES ('O''Hara', x'00ff'), (CAST(x'c3ff41' AS TEXT), NULL);
            INSERT INTO food VALUES (1, 0.1), (1, 2.5), (2, NULL), (2, 7), (2, 8);""")
    for name, script in (("shop", SHOP), ("club", "CREATE TABLE m (a);\nINSERT INTO m VALUES (1);")):
        with closing(sqlite3.connect(tmp_path / f"db/{name}/{name}.sqlite")) as database:
            database.executescript(script)
    rows = [("zoo", " How much food? ", "SELECT sum(kilos) FROM food"), ("shop", "Names?", "SELECT name FROM items"),
            ("club", "How many?", "SELECT count(*) FROM m"), ("zoo", "Names?", 'SELECT name FROM "Big cats"')]
    items = [dict(zip(("db_id", "question", "query"), row, strict=True), query_toks=[]) for row in rows]
    (tmp_path / "q.json").write_text(json.dumps(items))
    return tmp_path


def test_spider_converts_with_three_rows_of_each_table(spider):
    done = convert(spider, "spider", "q.json", "db", "out.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out.jsonl: 4 conversations, 4 user turns: 0 CLARIFY, 4 ANSWER, 0 skipped\n"
    zoo, shop, club, again = [row["messages"] for row in data.read_vertex_jsonl(spider / "out.jsonl")]
    assert zoo == [
        {"role": "system", "content": """\
CREATE TABLE "Big cats" (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, face BLOB);
INSERT INTO "Big cats" VALUES(1,'O''Hara',X'00FF');
INSERT INTO "Big cats" VALUES(2,'\ufffd\ufffdA',NULL);
CREATE TABLE food (cat INTEGER REFERENCES "Big cats" (id), kilos REAL);
INSERT INTO "food" VALUES(1,0.1);
INSERT INTO "food" VALUES(1,2.5);
INSERT INTO "food" VALUES(2,NULL);"""},
        {"role": "user", "content": "How much food?", "requires_clarification": False},
        {"role": "model", "content": "SELECT sum(kilos) FROM food"}]  # fmt: skip
    assert again[0] == zoo[0] and shop[0]["content"].count("INSERT") == 6
    assert club[0]["content"] == 'CREATE TABLE m (a);\nINSERT INTO "m" VALUES(1);'
    for messages in (zoo, shop, club, again):
        assert execution_match(messages[2]["content"], messages[2]["content"], messages[0]["content"]) == RIGHT


@pytest.mark.parametrize(("item", "problem"), [
    ({"db_id": "zoo", "question": "Names?", "query": "SELECT nope FROM food"}, "q.json: item 0: execution_match: the gold query 'S"),
    ({"db_id": "zoo", "question": "Names?", "query": "SELECT nope FROM food WHERE kilos = '?'"}, "no such column: nope"),
    ({"db_id": "none", "question": "Names?", "query": "SELECT 1"}, "db/none/none.sqlite: cannot be read as a database"),
    ({"db_id": "long", "question": "Names?", "query": "SELECT 1"}, "long.sqlite: cannot be read as a database (string or"),
    ({"db_id": "text", "question": "Names?", "query": "SELECT 1"}, "text.sqlite: cannot be read as a database (file"),
    ({"db_id": 3, "question": "Names?", "query": "SELECT 1"}, "q.json: item 0 is not as spider is published"),
    ({"db_id": "zoo", "query": "SELECT 1"}, "q.json: item 0 is not as spider is published"),
])  # fmt: skip
def test_spider_refuses_in_one_line(spider, item, problem):
    for name in ("long", "text"):
        (spider / "db" / name).mkdir()
    (spider / "db/text/text.sqlite").write_text("x" * 999)
    with closing(sqlite3.connect(spider / "db/long/long.sqlite")) as database:
        database.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(30000));")
    (spider / "q.json").write_text(json.dumps([item]))
    done = convert(spider, "spider", "q.json", "db", "out.jsonl")
    assert done.returncode == 2 and done.stderr.startswith("data.py: error: ") and done.stderr.count("\n") == 1
    assert problem in done.stderr and sorted(path.name for path in spider.iterdir()) == ["db", "q.json"]


def test_spider_gives_up_a_database_that_takes_for_ever(spider, monkeypatch):
    """Each look at the clock takes 100 seconds."""
    looks = itertools.count(0, 100)
    monkeypatch.setattr(data.time, "thread_time", lambda: next(looks))
    with pytest.raises(InputError, match="zoo.sqlite: cannot be read as a database"):
        data.script_of(spider / "db/zoo/zoo.sqlite")


# ------------------------------------------------------------------------------------------------------------ AmbigSQL


def test_ambig_sql_is_whole(tmp_path):
    rows = make(60)
    assert rows == make(60) and rows[:20] == make(20) and rows != make(60, seed=1)
    data.write_jsonl(tmp_path / "made.jsonl", rows)
    pairs = data.ACTDataset(data.read_vertex_jsonl(tmp_path / "made.jsonl"), data.CLARIFY, 1).prepare_datasets()
    asked = [pair for pair in pairs if pair.action == data.CLARIFY]
    assert len(pairs) == 60 + len(asked) and 20 < len(asked) < 40
    for pair in pairs:
        assert execution_match(pair.target, pair.target, pair.context) == RIGHT
        wrong = (pair.chosen if pair.action == data.CLARIFY else pair.rejected)[0][1]
        assert data.is_question(wrong) and execution_match(wrong, pair.target, pair.context) == WRONG
    assert data.rule_users([(pair, pair.gold[:1], "") for pair in asked]) == [pair.gold[1][1] for pair in asked]


def test_the_numbers_in_a_column_differ():
    for world in WORLDS:
        columns, rows = next(iter(world.tables.values()))
        names = [column.split()[0] for column in columns.split(", ")]
        for column in world.numbers.values():
            assert len({row[names.index(column)] for row in rows}) == len(rows)
