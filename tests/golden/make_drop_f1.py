"""Records what the official scorer says about the pairs below, in drop_f1.json beside this file.

    git clone https://github.com/dengyang17/PACIFIC && pip install numpy scipy pandas
    python tests/golden/make_drop_f1.py PACIFIC/UniPCQA COMMIT

The directory must hold the scorer's tatqa_metric.py and tatqa_utils.py; COMMIT is only noted down.
"""

import hashlib
import json
import sys
from pathlib import Path

# (predicted, gold), texts; the scorer also takes lists of them, which nothing here needs
PAIRS = [
    # plain words: case, order, repetition, articles, punctuation
    ("revenue", "revenue"),
    ("Revenue", "revenue"),
    ("the revenue", "revenue"),
    ("a cat and an owl", "cat and owl"),
    ("net revenue", "revenue"),
    ("revenue net", "net revenue"),
    ("net net revenue", "net revenue"),
    ("revenue", "cost"),
    ("cost-plus type", "cost plus type"),
    ("cost-plus type", "costplus type"),
    ("fixed-price type, cost-plus type", "fixed-price type"),
    ("U.S. dollars", "US dollars"),
    ("the company's debt", "company debt"),
    ("Theatre", "atre"),
    ("a/b testing", "ab testing"),
    ("well - known", "well known"),
    ("  spaced   out  ", "spaced out"),
    ("tab\tinside", "tab inside"),
    ("snake_case", "snakecase"),
    # nothing to compare
    ("", ""),
    ("", "revenue"),
    ("revenue", ""),
    ("the", "a"),
    ("...", "!"),
    ("the", "revenue"),
    (" ", ""),
    # numbers and their spellings
    ("5", "5.0"),
    ("1,000", "1000"),
    ("1,000.50", "1000.5"),
    ("$1,496.5", "1496.5"),
    ("$  1,452.4", "$1,452.4"),
    ("€5", "£5"),
    ("¥1_000", "1"),
    (".5", "0.5"),
    (".5", "none"),
    (".5", ".7"),
    (".5", "5"),
    ("inf", "-.5"),
    ("-.5", "+.5"),
    ("5.", "5"),
    ("0.00004", "0"),
    ("1.23456", "1.2346"),
    ("007", "7"),
    ("1e5", "1"),
    ("inf", "nan"),
    ("100000000000000000000", "1e20"),
    ("2019", "2018"),
    ("1st", "1"),
    ("5,", "5"),
    ("05/06", "506"),
    ("0012!", "12"),
    ("00:30", "30"),
    ("3/4", "3/4ths"),
    ("!!inf!!", "inf"),
    ("20-30%", "2030%"),
    ("'5'", "5"),
    # signs, parentheses, percents
    ("-5", "5"),
    ("+5", "5"),
    ("(5)", "-5"),
    ("(1,234)", "-1234"),
    ("($5)", "-5"),
    ("(5.5)%", "-5.5"),
    ("- 5", "5"),
    ("–5", "-5"),
    ("−5", "-5"),
    ("12%", "0.12"),
    ("12%", "12"),
    ("12 %", "12"),
    ("12 percent", "12%"),
    ("(12%)", "-0.12"),
    ("(12%)", "0.12"),
    ("-22.22%", "-0.2222"),
    ("%5", "5"),
    ("\t%5", "5"),
    ("5%%", "0.05"),
    # scale words, in the same token or the next one
    ("5 million", "5000000"),
    ("5million", "5000000"),
    ("5 million", "5 millions"),
    ("1.5 billion dollars", "1.5 billion"),
    ("5\tmillion", "5000000"),
    ("5\tdogs", "5 dogs"),
    ("5\u00a0thousand", "5000"),
    ("(5\tmillion)", "-5000000"),
    ("3\tpercent", "0.03"),
    ("2\thundred", "200"),
    ("thousand", "1000"),
    # derivations
    ("44.1-56.7 = -12.6", "44.1-56.7 = -12.6"),
    ("44.1 - 56.7 = -12.6", "44.1-56.7 = -12.6"),
    ("-12.6", "44.1-56.7 = -12.6"),
    ("(2,370 - 2,929)/2,929 = -19.09", "(2,370-2,929)/2,929 = -19.09"),
    ("2+6 = 8", "2+6 = 9"),
    ("(185+136) / 2 = 160.5", "160.5"),
    # other scripts and signs
    ("Café", "cafe"),
    ("CAFÉ", "café"),
    ("Cafe\u0301", "Café"),
    ("naïve “quoted” text", "naïve quoted text"),
    ("İstanbul", "istanbul"),
    ("٣", "3"),
    ("½", "0.5"),
    ("収益 2019", "収益 2018"),
    ("the\u00a0revenue", "revenue"),
]


def main(directory, commit):
    sys.path.insert(0, directory)
    from tatqa_metric import get_metrics

    names = "tatqa_metric.py", "tatqa_utils.py"
    files = {name: hashlib.sha256((Path(directory) / name).read_bytes()).hexdigest() for name in names}
    rows = []
    for predicted, gold in PAIRS:
        exact, f1 = get_metrics(predicted, gold)
        rows.append({"predicted": predicted, "gold": gold, "exact_match": float(exact), "f1": float(f1)})
    source = {"repository": "https://github.com/dengyang17/PACIFIC", "directory": "UniPCQA", "commit": commit}
    source["sha256"] = files
    lines = ",\n".join(json.dumps(row) for row in rows)
    target = Path(__file__).with_name("drop_f1.json")
    target.write_text(f'{{"source": {json.dumps(source)},\n"pairs": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{target}: {len(rows)} pairs")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
