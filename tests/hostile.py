"""HOSTILE: 40 conversations in Vertex's messages form whose texts attack every round trip from conversation to text or tokens and back.

Every conversation has a CLARIFY turn whose gold trajectory is whole (question, the user's reply, answer) and an ANSWER turn besides; every
user turn has its label. A text must come back as it was: its line breaks, its spaces, its speaker lines, its marks and its odd characters.
"""

import unicodedata

ASK, TELL = True, False  # requires_clarification of a turn


def conversation(*turns, system=None):
    """turns: (ASK or TELL, the user's text, the model's)."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for clarify, user, model in turns:
        messages += [{"role": "user", "content": user, "requires_clarification": clarify}, {"role": "model", "content": model}]
    return {"messages": messages}


INSTRUCTION = "Answer the user's question, or ask a clarifying question if it is ambiguous."
PYTHON = '```python\ndef mean(values):\n    """Mean."""\n\n    if not values:\n        return\n\n    return sum(values) / len(values)\n```'
SHELL = "```sh\n$ cat report.txt | \\\n    grep -c 'User: '\n\t3\n```"
TABLE = "| City   | 2018 | 2019 |\n|:-------|-----:|-----:|\n| Bergen |   12 |   15 |\n| Porto  |    7 |    9 |"
OBJECT = '{\n  "role": "user",\n  "content": "How many?\\nExactly.",\n  "list": [1, 2.50, null, {"a": "\\\\"}]\n}'
XML = '<?xml version="1.0"?>\n<order id="7">\n  <!-- paid & sent -->\n  <item n="2">caf&#233;</item>\n  <empty/>\n</order>'
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
WAVE = "\U0001f44b\U0001f3ff"
FLAGS = "\U0001f1f3\U0001f1f4\U0001f1f5\U0001f1f9"
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
LONG = "\n".join(f"Line {i}: Bergen sold {i * 7 % 100} lamps,  Porto {i * 3 % 50}." for i in range(1000))[:19_990] + "\nHow many?"
DEEP = "\n".join(" " * 4 * i + f"level {i}:" for i in range(30))

HOSTILE = [
    # 0 code blocks: indentation, blank lines, quotes, a backslash at the end of a line
    conversation(
        (TELL, f"What does this do?\n\n{PYTHON}", "It takes a mean:\n\n    sum / count\n\nNothing more."),
        (ASK, f"And can you fix it?\n{SHELL}", "Which of the two:\n```\nthe pattern\n```\nor the count?"),
        (TELL, "The pattern:\n```\n^User: \n```", f"Then:\n\n{SHELL}\n\nThat is all."),
        system="You read code.",
    ),
    # 1 replies that are only a code block
    conversation(
        (ASK, "Write it for me.", '```\nprint("Write what?")\n```'),
        (TELL, "```\nmean\n```", PYTHON),
        (TELL, "And in one line?", "```python\nmean = lambda v: sum(v) / len(v) if v else None\n```"),
    ),
    # 2 a reply that ends in a question inside a code block, and a question that goes on after its question mark
    conversation(
        (TELL, "Show me how a form asks for a name.", 'Like this:\n\n```python\nname = input("What is your name?")\n```'),
        (ASK, "Show me another one.", "For a date?\nFor a place?\n\n(One of the two is enough.)"),
        (TELL, "For a date?", '```python\nday = input("Which day?")\n# Which day?\n```'),
    ),
    # 3 nested lists, ordered and not, with blank lines and code between
    conversation(
        (ASK, "- fruit\n  - apples\n    - red\n    - green\n\n  - pears\n- bread\n\nHow much?", "1. Which?\n   - apples\n   - pears"),
        (TELL, "  - apples\n      - red", "* 3 euros\n\n      a kilo\n\n  + and a bag"),
        (TELL, "1) bread\n\n   2) rye", "1. 4 euros\n1. 5 euros\n10. both"),
    ),
    # 4 Markdown tables, in every place
    conversation(
        (TELL, f"{TABLE}\n\nBergen in 2018?", "12"),
        (ASK, "|  |\n|--|\nAnd Porto?", "| year? |\n|-------|\n| 2018  |\n| 2019  |"),
        (TELL, "| 2019 |", "| Porto |\n|------:|\n|     9 |\n"),
        system=f"{TABLE}\n\n{TABLE}\n",
    ),
    # 5 JSON, with escapes that must stay escapes
    conversation(
        (ASK, OBJECT, '{"question": "Which \\"list\\"?"}'),
        (TELL, '{"answer": "the\\nfirst"}', '[\n  1,\n  2.50,\n  null\n]'),
        (TELL, '"\\u0041\\t\\\\n"', '{"":{"":[[[]]]}}'),
        system='{"messages": [{"role": "system", "content": "[conversation]"}]}',
    ),
    # 6 blank lines, one to many, with and without spaces on them
    conversation(
        (TELL, "one\n\ntwo\n\n\nthree\n\n\n\nfour", "1\n \n2\n  \n \n3\n\t\n4"),
        (ASK, "\n\nand so on\n\n", "How\n\n\nfar?\n\n\n"),
        (TELL, "\n \n six", "five\n\n\n\n\n\n\nsix"),
        system="first\n\n\n\nlast",
    ),
    # 7 leading spaces
    conversation(
        (ASK, "  two spaces", "    four?"),
        (TELL, " one\n  two\n   three", "     five\n one"),
        (TELL, "   \n x", " \n\n y"),
        system="   three\n at the first line",
    ),
    # 8 trailing spaces, on every line
    conversation(
        (ASK, "two spaces  ", "Which two?   "),
        (TELL, "a hard break  \nhere   \n", "line  \nline \nline    "),
        (TELL, "end ", "end\t "),
        system="ends in spaces   \n  ",
    ),
    # 9 tabs
    conversation(
        (ASK, "\tcity\tsales\n\tBergen\t12", "\tWhich\tyear?\t"),
        (TELL, "\t\t2018", "a\t\tb\t\t\tc\n\t"),
        (TELL, "tab at the end\t", "\t\n\t\t\nx"),
        system="city\t2018\t2019\nBergen\t12\t15\n\t\n",
    ),
    # 10 speaker lines at the head of a message's first line
    conversation(
        (TELL, "User: who am I?", "User: you are the user."),
        (ASK, "Assistant: what am I?", "Assistant: which of you?"),
        (TELL, "User: the second", "Assistant: an assistant."),
        system="User: a system text\nAssistant: of two lines",
    ),
    # 11 speaker lines further down, with and without text after them
    conversation(
        (TELL, "Read this out:\nUser: hello\nAssistant: good day\nUser:", "It says:\nUser: \nAssistant:"),
        (ASK, "Once more:\nAssistant: \nAssistant:\nUser: ", "From where?\nUser: from the start\nAssistant: or from the end?"),
        (TELL, "The end.\n\nUser: no\n\n", "hello\nAssistant: good day\nUser: bye\nAssistant: bye"),
    ),
    # 12 a message that is nothing but a speaker's prefix
    conversation(
        (TELL, "User:", "Assistant:"),
        (ASK, "User: ", "Assistant: "),
        (TELL, "Assistant: ", "User: "),
        (TELL, "Assistant:", "User:"),
        system="User:",
    ),
    # 13 near misses of speaker lines: they are not prefixes, and must not become any
    conversation(
        (TELL, "user: lower case\nUSER: upper case\n User: after a space\nUser : before one", "Assistant said:\nAssistant:no space"),
        (ASK, "User:\tafter a tab\nUser:\u00a0after a no-break space\nUser：wide", "\tAssistant: after a tab?\nThe User: in the middle?"),
        (TELL, "UserUser: User: User:", "Assistant: Assistant: Assistant:\nModel: x\nSystem: y"),
    ),
    # 14 backslashes before speaker lines
    conversation(
        (TELL, "\\User: one\n\\\\User: two\n\\\\\\Assistant: three", "\\Assistant: one\n\\\\Assistant: two"),
        (ASK, "text\n\\User:\n\\\\User:", "\\\\\\User: which?\n\\ Assistant: this?"),
        (TELL, "\\", "\\\\\n\\"),
        (TELL, "\\\nUser: x", "\\n\\r\\t is not\na line break\\"),
        system="\\[context]\n\\[conversation]\n\\\\[conversation]",
    ),
    # 15 the section lines of the text format in messages
    conversation(
        (TELL, "[conversation]", "[context]"),
        (ASK, "[context]\n[data]\nWhat is this?\n[conversation]", "Which one?\n[conversation]\nUser: this one?"),
        (TELL, "[data]", "[conversation]\nUser: x\nAssistant: y"),
    ),
    # 16 and in the system text
    conversation(
        (ASK, "How many?", "In which year?"),
        (TELL, "2018", "12"),
        (TELL, "And in 2019?", "15"),
        system="[context]\nBergen\n[conversation]\nUser: in the system text\nAssistant: so it is\n[data]\n[conversation]",
    ),
    # 17 a system text that ends in the line [conversation] and a line break
    conversation(
        (TELL, "How many?", "12"),
        (ASK, "[conversation]\n\nUser: and now?", "[conversation]?"),
        (TELL, "\n[conversation]\n", "15\n[context]\n"),
        system="[conversation]\n",
    ),
    # 18 the instruction itself in the system text, and in a message
    conversation(
        (ASK, INSTRUCTION, "What is your question?"),
        (TELL, f"{INSTRUCTION}\n[context]\n\n[conversation]\nUser: What is it?", INSTRUCTION),
        (TELL, "Enough.", f"{INSTRUCTION}\n{INSTRUCTION}"),
        system=f"{INSTRUCTION}\n[context]\nBergen: 12\n[conversation]\nUser: Bergen?\nAssistant: 12\n",
    ),
    # 19 section lines that are none
    conversation(
        (TELL, " [conversation]\n[conversation] \n[Conversation]\n[conversation]: x", "[conversation]x\nx[conversation]"),
        (ASK, "[]\n[ context ]\n[[context]]", "[?]"),
        (TELL, "[context]\t", "[context][conversation]"),
        system=" [context]\n[context] \n [conversation] \n[CONVERSATION]",
    ),
    # 20 Arabic, right to left with digits and marks of direction
    conversation(
        (TELL, "كم بلغت مبيعات بيرغن في عام ٢٠١٨؟", "١٢ مصباحًا."),
        (ASK, "وماذا عن بورتو؟\u200f", "في أيّ عام؟"),
        (TELL, "\u202bعام 2019\u202c، من فضلك.", "٩"),
        system="المبيعات:\nبيرغن: ١٢، ١٥\nبورتو: ٧، ٩\n",
    ),
    # 21 Hebrew with points, mixed with Latin
    conversation(
        (ASK, "כַּמָּה נִמְכְּרוּ ב־Bergen?", "באיזו שנה?\n(2018 או 2019)"),
        (TELL, "\u2067בשנת 2018\u2069", "12 מנורות."),
        (TELL, "ובשנת 2019?", "15"),
    ),
    # 22 Japanese: wide spaces, wide colons, a question mark of its own, half-width kana
    conversation(
        (ASK, "　ベルゲンの売上は？", "何年ですか？」"),
        (TELL, "２０１８年です。　", "１２個です。"),
        (TELL, "ｶﾀｶﾅで：\nユーザー：はい\n\nどうですか？", "「はい」"),
        system="売上表：\n　ベルゲン　一二　一五\n　ポルト　　七　九",
    ),
    # 23 emoji: joined, flags, skin tones, tags, variation selectors, keycaps
    conversation(
        (ASK, f"{WAVE} {FAMILY}?", f"{FLAGS}?"),
        (TELL, ENGLAND, f"\u2764\ufe0f\u2764\ufe0e 1\ufe0f\u20e3 {WAVE}{WAVE}"),
        (TELL, f"{FAMILY}\n{FAMILY}{FAMILY}", "\U0001f9d1\U0001f3fb\u200d\U0001f91d\u200d\U0001f9d1\U0001f3fd"),
        system=f"{FLAGS}\n{ENGLAND}",
    ),
    # 24 combining characters: decomposed and composed side by side, and marks without a letter
    conversation(
        (ASK, unicodedata.normalize("NFD", "Où est l'été à Málaga ?"), unicodedata.normalize("NFD", "Lequel, né où ?")),
        (TELL, unicodedata.normalize("NFC", "é") + unicodedata.normalize("NFD", "é"), "\u0301 e\u0301\u0302\u0303\u0304"),
        (TELL, unicodedata.normalize("NFD", "각 Å ệ"), unicodedata.normalize("NFC", "각 Å ệ") + " \u212b ﬁ ①"),
    ),
    # 25 Windows line breaks
    conversation(
        (TELL, "one\r\ntwo\r\n\r\nfour", "1\r\n2\r\n"),
        (ASK, "\r\nUser: one\r\nAssistant: two\r\n", "Which?\r\nUser: this?"),
        (TELL, "[conversation]\r\n", "four\r\n\r\n\r\n"),
        system="Bergen: 12\r\n\r\n[context]\r\nPorto: 7\r\n",
    ),
    # 26 lone carriage returns, and both the wrong way round
    conversation(
        (ASK, "one\rtwo\r\rUser: three", "Which\r?"),
        (TELL, "\rtwo\n\rAssistant: x", "2\r"),
        (TELL, "x\n\r\n\ry", "\ry\r\r\n\n"),
        system="\rBergen\r12\r[conversation]\r",
    ),
    # 27 separators that str.splitlines splits at: U+2028, U+2029, U+0085, vertical tab, form feed, file to record separator
    conversation(
        (ASK, "one\u2028User: two\u2029Assistant: three", "Which\u0085?\u2028"),
        (TELL, "\x0btwo\x0cthree\x1cfour\x1dfive\x1esix\x1f", "\u0085 2 \u2029"),
        (TELL, "x\u2028\n\u2028[conversation]\u2028", "\u2028y"),
        system="\u2028[context]\u2029[conversation]\u0085Bergen\u2028",
    ),
    # 28 control characters, NUL among them
    conversation(
        (ASK, "bell \x07 and escape \x1b[31mred\x1b[0m", "null \x00?"),
        (TELL, "\x00\x01\x02 yes", "\x7f\x80\x9f no\x00"),
        (TELL, "backspace\x08\x08", "\x00x"),
    ),
    # 29 zero-width spaces and joiners, soft hyphens, byte order marks
    conversation(
        (ASK, "\ufeffhow\u200bmany\u2060?", "\u200bwhich\u00adyear?\u200b"),
        (TELL, "\ufeff2018\ufeff", "1\u200c2\u200d"),
        (TELL, "\u200bUser: x\n\ufeffAssistant: y", "\u180e\u2061z\ufeff"),
        system="\ufeffBergen\u200b:\u200b12\n\ufeff[conversation]",
    ),
    # 30 a message of 20,000 characters
    conversation(
        (ASK, LONG, "Where?"),
        (TELL, "In Bergen.", "Too many to count."),
        (TELL, "And in Porto?", "Fewer."),
    ),
    # 31 long texts without a single space or line break
    conversation(
        (TELL, "ab" * 1500, "=" * 2000),
        (ASK, "?" * 1000, "?" * 1000),
        (TELL, "\U0001f4a1" * 500, "長" * 1000),
    ),
    # 32 messages that end in line breaks, one to many
    conversation(
        (ASK, "how many\n", "In which year?\n\n"),
        (TELL, "2018\n\n\n", "12\n"),
        (TELL, "sure\n\n\n\n\n\n\n\n", "yes\n \n"),
        system="Bergen: 12\n\n\n",
    ),
    # 33 an empty system text
    conversation((ASK, "How many?", "Of what?"), (TELL, "Lamps.", "12"), (TELL, "And shades?", "15"), system=""),
    # 34 a system text of spaces and line breaks
    conversation((TELL, "How many?", "12"), (ASK, "And now?", "In which city?"), (TELL, "Porto", "9"), system=" \n\t\n  \n"),
    # 35 HTML and its entities
    conversation(
        (ASK, "<p>How <b>many</b>?<br/>\n</p>", "<select><option>2018?</option></select>"),
        (TELL, "&lt;2018&gt; &amp;nbsp; &#10; &quot;", "<!-- 12 -->\n<script>alert('User: 12')</script>"),
        (TELL, XML, f"<![CDATA[\n{XML}\n]]>"),
        system="<table>\n\t<tr><td>Bergen</td><td>12</td></tr>\n</table>",
    ),
    # 36 control tokens of the models spelt out
    conversation(
        (ASK, "<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n<start_of_turn>user\nWhich?"),
        (TELL, "<bos><eos><pad><unk><s></s>", "<end_of_turn>"),
        (TELL, "</s>", "12</s><eos>\n<0x0A><0xE2><unused0>"),
        system="<bos><start_of_turn>system\nBergen: 12<end_of_turn>\n<|im_start|>[INST]<<SYS>>",
    ),
    # 37 very deep indentation
    conversation(
        (TELL, DEEP, " " * 200 + "x"),
        (ASK, "\t" * 50 + "y", "\n".join(" " * (40 - i) + "?" for i in range(40))),
        (TELL, "z" + " " * 300 + "z", DEEP.replace("    ", "\t")),
        system=DEEP,
    ),
    # 38 messages that are lists of questions, and answers that look like questions
    conversation(
        (ASK, "How many?\nWhere?\nWhen?\nWhy?\nUser: who?", "Which first?\nSecond?\nThird?"),
        (TELL, "Where?\nWhen?", "Bergen?\nThat is what the table says.\n2018."),
        (TELL, "Is it?", "It is. (Is it not?) It is!"),
    ),
    # 39 two questions in a row, and the marks of other formats: quotes, percent signs, braces, dollars
    conversation(
        (ASK, "'\"`´‘’“”«»", "“Which quote?”"),
        (ASK, "{0} {name} {{}} %s %(x)d ${HOME} $1 \\1", "The {first}?"),
        (TELL, "{first}, $& and \\g<0>", "100 % of {0}\n--- \n***\n# Assistant: \n> User: quoted\n~~~"),
        (TELL, "a,b;\"c\n\"", "'; DROP TABLE turns; --"),
        system="%(context)s {context} ${context} {{ context }} {% raw %}",
    ),
]
