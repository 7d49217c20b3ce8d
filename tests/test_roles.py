"""What the helper roles are as text: their prompts, what is read from answers, and the rules that do without."""

import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import HOSTILE

import act
import data
from act import ROLES
from data import ANSWER, CLARIFY, Pair

ROOT = Path(__file__).parent.parent
GOLD = [("model", "In which league?"), ("user", "The second."), ("model", "1,234 points")]
PAIR = Pair(
    "", [("user", "Who won in 2018?"), ("model", "Ada."), ("user", "How many\npoints?")], CLARIFY, GOLD,
    [("model", "7")], GOLD, "1,234 points",
)  # fmt: skip
SAID = "User: Who won in 2018?\nAssistant: Ada.\nUser: How many\n  points?\n"
ASKING = "Assistant (asks a clarifying question):"


def helper_of(name, answer="", **config):
    """A role with the shipped prompt, played by a model that always gives this answer, and its list of prompts."""
    asked, role = [], ROLES[name]
    raw = (ROOT / "configs/prompts" / role.prompt).read_bytes()
    helper = act.Helper(name, act.HelperConfig(**config), act.read_prompt(raw, role.prompt, role))
    helper.ask = lambda prompts: asked.extend(prompts) or [answer] * len(prompts)
    return helper, asked


def prompt_of(name, request):
    """What a model is told by the shipped prompt."""
    helper, asked = helper_of(name)
    helper([request])
    return asked[0]


def read(name, answer, **config):
    """What a role makes of a model's answer."""
    helper, _ = helper_of(name, answer, **config)
    [result] = helper([REQUESTS[name]([f"text {i}" for i in range(8)])])
    if name == "judge_model_config" and result:
        exact, result = result
        assert exact == result
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def test_action_prompt_shows_both_actions_and_ends_with_the_response():
    prompt = prompt_of("action_model_config", "\nDo you {mean}\nthe league?\n")
    assert prompt.endswith("\n\nMessage: Do you {mean}\n  the league?\nAction:")
    assert prompt.count("\nAction: CLARIFY\n") >= 2 and prompt.count("\nAction: ANSWER\n") >= 2


def test_intent_prompt_has_the_gold_conversation_without_its_final_answer():
    prompt = prompt_of("intent_model_config", PAIR)
    assert prompt.endswith(f"\n\nConversation:\n{SAID}Assistant: In which league?\nUser: The second.\nIntent:")
    assert "1,234" not in prompt and prompt.count("\nIntent: The user wants to know ") >= 2


def test_user_prompt_has_intent_and_conversation_and_asks_for_the_users_line():
    request = PAIR, [("model", "Which {league}?")], "The user wants\nleague {two}."
    prompt = prompt_of("user_simulator_config", request)
    intent = "The user wants\n  league {two}."
    assert prompt.endswith(f"\n\nIntent: {intent}\nConversation:\n{SAID}Assistant: Which {{league}}?\nUser:")
    assert f"\nUser: {data.NOTHING_TO_ADD}\n" in prompt and "1,234" not in prompt


def test_question_prompt_has_the_examples_and_ends_where_the_question_begins():
    example = Pair("Leagues:\n\nA, B", [("user", "Who?")], CLARIFY, [("model", "Of\nwhom?"), *GOLD[1:]], [], [], "")
    prompt = prompt_of("preference_model_config", (PAIR, [example, example]))
    head = f"{data.INSTRUCTION}\n[context]\n"
    shown = f"{head}Leagues:\n\nA, B\n[conversation]\nUser: Who?\n{ASKING} Of\n  whom?\n\n"
    assert prompt.endswith(f"\n\n{shown}{shown}{head}\n[conversation]\n{SAID}{ASKING}") and "1,234" not in prompt


def test_judges_prompt_has_the_gold_conversation_the_reference_and_the_answer_and_asks_for_the_verdict():
    """The answer comes in the place of the gold one, which is the reference; lines after the first are indented."""
    request = replace(PAIR, target="1,234\npoints\n"), "It was\n\n{gold}\nReference: 7"
    prompt = prompt_of("judge_model_config", request)
    conversation = f"\n\nConversation:\n{SAID}Assistant: In which league?\nUser: The second.\n"
    answer = "Answer: It was\n  \n  {gold}\n  Reference: 7"
    assert prompt.endswith(f"{conversation}Reference: 1,234\n  points\n  \n{answer}\nVerdict:")
    assert prompt.count("1,234") == 1, "in the reference alone"
    assert prompt.count("\nVerdict: RIGHT\n") >= 2 and prompt.count("\nVerdict: WRONG\n") >= 2


def test_judges_prompt_of_a_turn_to_answer_at_once_shows_no_exchange():
    pair = Pair("", PAIR.history, ANSWER, GOLD[-1:], GOLD[:1], GOLD[-1:], "1,234 points")
    end = f"\n\nConversation:\n{SAID}Reference: 1,234 points\nAnswer: 1,234\nVerdict:"
    assert prompt_of("judge_model_config", (pair, "1,234")).endswith(end)


def test_every_role_has_a_shipped_prompt_with_its_names_and_no_other():
    for role in ROLES.values():
        text = (ROOT / "configs/prompts" / role.prompt).read_text(encoding="utf-8")
        assert set(re.findall(r"\{(\w+)\}", text)) == set(role.names) == set(re.findall(r"\{([^}]*)\}", text))
        assert role.stop.startswith("\n") and role.stop.endswith(":")
    assert data.NOTHING_TO_ADD in (ROOT / "configs/prompts/user.txt").read_text(encoding="utf-8")


REQUESTS = {  # role -> a request whose texts are the given ones
    "action_model_config": lambda texts: texts[0],
    "intent_model_config": lambda texts: pair_of(texts),
    "user_simulator_config": lambda texts: (pair_of(texts), [("model", texts[3])], texts[4]),
    "preference_model_config": lambda texts: (pair_of(texts), [pair_of(texts[5:])]),
    "judge_model_config": lambda texts: (replace(pair_of(texts), target=texts[3]), texts[4]),
}


def pair_of(texts):
    gold = [("model", texts[1]), ("user", texts[2]), ("model", "the answer")]
    return Pair("", [("user", texts[0])], CLARIFY, gold, gold[-1:], gold, "the answer")


BREAKS = (
    "\n", "\n\n", "User: ", "Assistant: ", "\nUser: ", "\nAssistant: ", "\nIntent:", "\nConversation:\n",
    "\nMessage: ", "\nAction: ANSWER", "\nReference: ", "\nAnswer: ", "\nVerdict: RIGHT",
    "[conversation]", "\n[conversation]\n", f"\n{ASKING}", "x", " ", "\\", "\r",
    "{intent}", "{response}", "\\n", "\\1",
)  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_no_message_breaks_out_of_its_place_in_a_prompt(name):
    """The lines that do not begin with two spaces are those of a prompt whose texts stop at their first line."""
    rng, cases = random.Random(0), []
    for row in HOSTILE:
        texts = [message["content"] for message in row["messages"]]
        cases.append([texts[i % len(texts)] for i in range(8)])
    cases += [["".join(rng.choices(BREAKS, k=rng.randrange(6))) for _ in range(8)] for _ in range(800)]
    for texts in cases:
        texts = [text.strip() for text in texts] if name == "action_model_config" else texts
        firsts = [text.split("\n")[0] for text in texts]
        long, short = (prompt_of(name, REQUESTS[name](each)).split("\n") for each in (texts, firsts))
        long, short = ([line.rstrip() for line in each if line[:2] != "  "] for each in (long, short))
        assert long == short


def test_the_texts_of_messages_can_be_read_back_from_what_is_shown():
    for row in HOSTILE:
        messages = [(m["role"], m["content"]) for m in row["messages"] if m["role"] != "system"]
        shown = re.split(r"^(?:User|Assistant): ", act.indented(messages), flags=re.MULTILINE)[1:]
        assert [text.replace("\n  ", "\n").removesuffix("\n") for text in shown] == [text for _, text in messages]


def test_of_a_long_message_a_helper_is_shown_the_end():
    assert act.in_prompt("x" * 20_000) == "x" * 20_000
    assert act.in_prompt("no" + "x" * 19_999) == "o" + "x" * 19_999
    assert len(act.indented([("user", "word " * 20_000), ("model", "Which?")])) < 20_100


def test_no_rule_knows_the_final_answer():
    assert data.rule_intents([PAIR]) == ["Assistant: In which league?\nUser: The second."]
    assert data.rule_intents([Pair("", PAIR.history, ANSWER, GOLD[-1:], GOLD[:1], GOLD[-1:], "1,234 points")]) == [""]


# ----------------------------------------------------------------------------------------------------------------------
# What is read from answers


@pytest.mark.parametrize(("answer", "action"), [
    ("CLARIFY", CLARIFY), (" ANSWER\n", ANSWER), ("**CLARIFY**", CLARIFY), ("_ANSWER_", ANSWER), ("clarify.", CLARIFY),
    ("ANSWER: it states a fact.", ANSWER), ("ANSWER: It states the total; no need to CLARIFY.", ANSWER),
    ("**Answer:** the message asks nothing to clarify", ANSWER), ("CLARIFY: it has no ANSWER", CLARIFY),
    ("Answer", ANSWER), ("Action: CLARIFY", CLARIFY), ("Answer: CLARIFY", CLARIFY), ("Answer: clarify", CLARIFY),
    ("The answer is CLARIFY", CLARIFY), ("ANSWER\n\nMessage: Which?\nAction: CLARIFY", ANSWER),
    ("No clarification: it answers", ANSWER), ("CLARIFYING", CLARIFY),
    ("This is not an ANSWER: CLARIFY", CLARIFY), ("It doesn't CLARIFY, so ANSWER", ANSWER),
    ("This message is not an answer, it is to clarify", CLARIFY), ("not to clarify", None), ("Not an ANSWER.", None),
    ("", None), ("yes", None), ("unanswered", None), ("Klären", None), ("?", None),
])  # fmt: skip
def test_action_is_read_from(answer, action):
    assert read("action_model_config", answer) == action


@pytest.mark.parametrize(("answer", "intent"), [
    (" The user wants A.", "The user wants A."), ("Intent: The user\nwants A.", "The user wants A."),
    ("Here is the summary:\n\nThe user wants A.\n\nMore talk.", "The user wants A."),
    ("The user wants A.\n\nConversation:\nUser: hi\n", "The user wants A."),
    ("The user wants A.\nUser: hi", "The user wants A."),
    ("**Intent:** The user wants A: all.", "The user wants A: all."),
    ("Here it is:", None), ("\n", None), ("Intent:", None),
])  # fmt: skip
def test_intent_is_read_from(answer, intent):
    assert read("intent_model_config", answer) == intent


@pytest.mark.parametrize(("answer", "reply"), [
    (" 2019", "2019"), ("\n2019\n", "2019"), ("User: 2019", "2019"), ("User:\n2019", "2019"),
    ("**User:** 2019", "2019"), ("2019\nAssistant: 42", "2019"), ("2019 Assistant: 42", "2019"),
    ("2019\nUser: 2020", "2019"), ("-5", "-5"), ("User fees", "User fees"),
    ("User's reply: 2019", "2019"), ("Reply: 2019", "2019"), ("user: 2019", "2019"), ("Time: 5 pm", "Time: 5 pm"),
    ("Assistant: Which?", None), ("", None), ("User:", None), (" \n", None),
])  # fmt: skip
def test_users_reply_is_read_from(answer, reply):
    assert read("user_simulator_config", answer) == reply


@pytest.mark.parametrize(("answer", "question"), [
    ("Which year?", "Which year?"), ("Assistant: Which year?", "Which year?"),
    (f"{ASKING} Which year?", "Which year?"), ("**Assistant:** Which year?\nUser: 2019", "Which year?"),
    ("Sure, here it is:\n\nAssistant: Which year?", "Which year?"), ("Which year?\nWhich month?", "Which year?"),
    ("It was 42.", None), ("It was 42.\n\nUser: And then?", None), ("Which year", "Which year"), ("", None),
])  # fmt: skip
def test_question_is_read_from_and_no_question_mark_is_made_up(answer, question):
    assert read("preference_model_config", answer) == question


@pytest.mark.parametrize(("answer", "verdict"), [
    ("RIGHT", 1.0), (" WRONG\n", 0.0), ("**RIGHT**", 1.0), ("_WRONG_", 0.0), ("right", 1.0), ("Wrong.", 0.0),
    ("Verdict: RIGHT", 1.0), ("The answer is WRONG.", 0.0), ('"Right"', 1.0), ("RIGHT: both say 5", 1.0),
    ("WRONG: it does not say which", 0.0), ("It is right.\n\nRIGHT", 1.0), ("\n\nWRONG", 0.0),
    ("The answer is not wrong.\n\n**RIGHT**", 1.0), ("It isn't right, it is WRONG", 0.0), ('{"verdict": "WRONG"}', 0.0),
    ("WRONG. The right answer is 5.", 0.0), ("RIGHT, because nothing is wrong", 1.0),
    ("RIGHT or WRONG", None), ("RIGHT\nWRONG", None), ("", None), ("?", None), ("yes", None), ("Incorrect", None),
])  # fmt: skip
def test_verdict_is_read_from(answer, verdict):
    assert read("judge_model_config", answer) == verdict


@pytest.mark.parametrize(("answer", "verdict"), [
    ("RIGHT\n\nConversation:\nUser: Who?\nReference: Ada\nAnswer: Bob\nVerdict: WRONG", 1.0),
    ("WRONG\nConversation:\nUser: Who?\nReference: Ada\nAnswer: Ada\nVerdict: RIGHT", 0.0),
])  # fmt: skip
def test_verdict_is_read_before_the_next_example_that_a_model_makes_up(answer, verdict):
    """A local checkpoint is not stopped at \"Conversation:\"."""
    assert read("judge_model_config", answer) == verdict


@pytest.mark.parametrize("answer", [
    "It is not RIGHT.", "NOT RIGHT", "This isn't right.", "not\nwrong", "Brighton", "a copyright notice",
    "wrongly, rightly", "not **RIGHT**", "not RIGHT, not WRONG",
])  # fmt: skip
def test_what_only_looks_like_a_verdict_is_none(answer):
    """A pair stays as it is rather than that the wrong side wins."""
    assert read("judge_model_config", answer) is None


GOOD = {  # role -> (an answer, the result that it means, what the role might think aloud)
    "action_model_config": ("CLARIFY", CLARIFY, "It might be an ANSWER."),
    "user_simulator_config": ("In May.", "In May.", "The user wants May. Which month?"),
    "intent_model_config": ("The user wants May.", "The user wants May.", "The user asks."),
    "preference_model_config": ("For which item?", "For which item?", "It asks for a month. Which month is open?"),
    "judge_model_config": ("RIGHT", 1.0, "RIGHT or WRONG?"),
}
THINKING = {  # {} and {} become thoughts and answer
    "lines": "<think>\n{}\n</think>\n\n{}", "one line": "<think>{}</think>{}", "thinking": "<thinking>\n{}\n</thinking>\n{}",
    "capitals": "<Think>{}</Think> {}", "attributes": '<think lang="en">{}</think>{}', "blanks": "< think >{}</ think >{}",
    "opening missing": "{}\n</think>\n\n{}", "twice": "<think>{0}</think>\n<think>{0}</think>\n{1}",
    "nested": "<think>{0}<think>{0}</think></think>{1}", "reasoning": "<reasoning>{}</reasoning>{}",
    "thought": "<thought>{}</thought>{}", "scratchpad": "<scratchpad>{}</scratchpad>{}", "seed": "<seed:think>{}</seed:think>{}",
    "magistral": "[THINK]{}[/THINK]{}", "kimi": "◁think▷{}◁/think▷{}", "gemma": "<|channel>thought\n{}<channel|>{}",
    "harmony": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "command": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "open thinker": "<|begin_of_thought|>\n{}\n<|end_of_thought|>\n\n<|begin_of_solution|>\n{}\n<|end_of_solution|>",
    "apertus": "<|inner_prefix|>{}<|inner_suffix|>{}", "hunyuan": "<think>\n{}\n</think>\n<answer>\n{}\n</answer>",
    "granite": "Here is my thought process:\n{}\n\nHere is my response:\n{}", "details": '<details type="reasoning">{}</details>\n{}',
    "labels": "Reasoning: {}\nAnswer: {}", "bold labels": "**Reasoning:** {}\n\n**Final Answer:** {}", "last line": "{}\n\n### Final answer: {}",
    "ernie": "{}\n</think>\n\n<response>\n{}\n</response>", "reflection": "<thinking>{}</thinking>\n<output>\n{}\n</output>",
}  # fmt: skip


@pytest.mark.parametrize("form", THINKING)
@pytest.mark.parametrize("name", ROLES)
def test_what_stands_after_the_reasoning_is_the_answer(name, form):
    answer, result, thoughts = GOOD[name]
    assert read(name, THINKING[form].format(thoughts, answer)) == result
    assert read(name, THINKING[form].format("", answer)) == result, "nothing was thought"


@pytest.mark.parametrize("opening", [
    "<think>\n", "<thinking>", "<think>{answer}</think>\n<think>", "[THINK]", "◁think▷", "<|channel|>analysis<|message|>",
    "<|channel>thought\n", "<reasoning>", "<|START_THINKING|>", "<think lang=en>",
    "Here is my thought process:\n", "**Reasoning:** ", "Thinking Process: ", "<details type=\"reasoning\">",
])  # fmt: skip
@pytest.mark.parametrize("name", ROLES)
def test_reasoning_that_was_cut_off_is_no_answer_and_max_new_tokens_is_named(name, opening):
    answer, _, thoughts = GOOD[name]
    said = f"{opening.format(answer=answer)}{thoughts} {answer}"
    assert read(name, said) is None
    helper, _ = helper_of(name, said, max_failures=1)
    with pytest.raises(act.RunStopped, match=f"^{name}: 1 failures in a row, .*max_new_tokens"):
        helper([REQUESTS[name](["x"] * 8)])


DRESSED = (
    '"{}"', "“{}”", "„{}“", "«{}»", "'{}'", "「{}」", "`{}`", "**{}**", '**"{}"**', "```\n{}\n```", "```text\n{}\n```",
    "{}<|im_end|>", "{}<end_of_turn>\n", "{}</s>", "{}<|eot_id|><|start_header_id|>user", "{}<｜end▁of▁sentence｜>", "</s>{}",
    "Here is the user's next message:\n\n\"{}\"", "Sure! Here is the question:\n\n{}", "**Here it is:**\n\n{}",
    "Here's the message: {}", "The answer:\n{}", "Certainly:\n```\n{}\n```\n", "**Answer:** {}", "Final answer: {}",
    "\\boxed{{{}}}", "\n\n{}\n\n", '"{}"<|im_end|>\n', '{{"answer": "{}"}}', "### Response\n{}", 'Answer: "{}"', "<|im_start|>assistant\n{}",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}", "<start_of_turn>model\n{}",
)  # fmt: skip


@pytest.mark.parametrize("form", DRESSED)
@pytest.mark.parametrize("name", ROLES)
def test_what_a_model_puts_around_its_answer_is_not_part_of_it(name, form):
    answer, result, _ = GOOD[name]
    assert read(name, form.format(answer)) == result


@pytest.mark.parametrize("reply", [
    "It's the \"second\" one", "\"A\" and \"B\"", "The user: me", "a < b", "Here we go", "5*3*", "the `x` of `y`", "I think so",
    "Which <output> do I mean", "The final answer: 5", "# 5", "I have my reasons: none", '{"a": 1}', "2 ** 3", "[1]", "<b>bold</b>",
])  # fmt: skip
def test_what_only_looks_like_dress_stays(reply):
    assert read("user_simulator_config", reply) == reply


@pytest.mark.parametrize("name", ROLES)
def test_no_answer_breaks_what_reads_it(name):
    rng, words = random.Random(0), (*BREAKS, "User:", "**", "CLARIFY", "answer", "?", " (asks)", ":", "Which?", "2019",
                                    "WRONG", "right", "not ", "Verdict:", "<think>", "</think>", '"', "```", "</s>",
                                    "Here is:\n")  # fmt: skip
    for _ in range(700):
        found = read(name, "".join(rng.choices(words, k=rng.randrange(9))))
        if name == "judge_model_config":
            assert found in (None, 0.0, 1.0)
        else:
            assert found is None or (found.strip() == found and found and "\n" not in found)


LONG = (
    "\n", " ", "\n ", " \n", "*", "**", "(", ")", "\"", "`", "``` ", "<", "<think>", "</think>", "<think> </think>", "</s>", "<|im_end|>",
    "not ", "not\n", "RIGHT", "n't WRONG ", "Here is ", "the\n:", "User: ", "User", "Assistant (", "Assistant:", "\nUser:\n", "\n\n:",
    "Intent:", "?", "? ", "?)", "select ", "'", "--", "/*", "[", "http://", "www..", "&a", "<a ", "x", "which ", "please ", "\\boxed{", "answer ",
    "<answer>", "Reasoning:", "\nAnswer:", "\n#", "Final answer", '{"a":"', "# ", "\r", "\t", "\u3000", "＿", "。", "か。",
)  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_long_hostile_answers_are_read_in_linear_time(name):
    """Here some 10 ms; where a pattern goes back over what it has read, from 1 s to minutes."""
    beginning = "What?" if name == "preference_model_config" else ""
    cases = [(beginning + unit * (16_000 // len(unit)), unit) for unit in LONG]
    cases += [(f"{beginning}{unit * 16_000}", unit) for beginning in ("Assistant", "User", "Assistant (", "not", "select", "<think>x")
              for unit in " *\n"]  # fmt: skip
    if name == "user_simulator_config":  # what is taken off around an answer is the same for all
        cases += [(unit * 100_000, unit) for unit in ("</s>", '"')]
        cases.append(("```\n" * 40_000 + "x" + "\n```" * 40_000, "fences in fences"))
    for answer, unit in cases:
        began = time.thread_time()
        read(name, answer, max_new_tokens=2**20)
        assert time.thread_time() - began < 0.4, (answer[:20], unit)


def test_of_a_long_answer_only_what_max_new_tokens_can_be_is_read():
    """16 characters a token: what a server sends beyond that is no answer to what it was asked."""
    reply = "a" * 200 + " CLARIFY"
    assert read("action_model_config", reply, max_new_tokens=12) is None
    assert read("action_model_config", reply, max_new_tokens=13) == CLARIFY


# ----------------------------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(("asked", "reply"), [
    ("In which league?", "The second."), ("Which league do you mean?", "The second."), ("league", "The second."),
    ("How many points in which league?", "The second."), ("Which club of which league?", "The second."),
    ("In which year?", data.NOTHING_TO_ADD), ("Which?", data.NOTHING_TO_ADD), ("", data.NOTHING_TO_ADD),
    ("Which club of the league was fined last?", data.NOTHING_TO_ADD), ("How many points?", data.NOTHING_TO_ADD),
    ("In which league and which year?", data.NOTHING_TO_ADD),
])  # fmt: skip
def test_user_by_rule_answers_a_question_at_least_half_of_which_is_the_gold_one(asked, reply):
    """What a question only repeats from the user is not held against it; nor does it help."""
    assert data.rule_users([(PAIR, [("model", asked)], None)]) == [reply]


@pytest.mark.parametrize(("asked", "gold", "same"), [
    ("Which year?", "What period are you asking about?", 1.0), ("When?", "Which fiscal quarter of sales?", 1.0),
    ("Sales of which months?", "In which years?", 1.0), ("Where?", "Which countries or regions?", 1.0),
    ("Which sales?", "Which year of sales?", 0.0), ("Which year of sales?", "Which sales?", 0.0),
    ("Where?", "When?", 0.0), ("Which year and where?", "In which region?", 1.0),
    ("Anything?", "Which one do you mean?", 1.0), ("Which revenues?", "What revenue?", 1.0),
    ("Net or gross sales?", "Net sales?", 2 / 3), ("Net sales of Rome?", "Net sales?", 1.0), ("", "Net?", 0.0),
])  # fmt: skip
def test_how_much_a_question_asks_for_what_another_one_asks(asked, gold, same):
    assert data.same_question(asked, gold, "How is Rome?") == pytest.approx(same)


def test_user_by_rule_takes_the_gold_question_that_fits_best():
    gold = [("model", "Which year?"), ("user", "2019"), ("model", "Net or gross revenue?"), ("user", "Net"),
            ("model", "12")]  # fmt: skip
    pair = Pair("", [("user", "How much?")], CLARIFY, gold, gold[-1:], gold, "12")
    asked = ["Net or gross revenue in what year?", "In what year?", "Is it gross or net revenue?", "Revenue of Rome?"]
    said = [[("model", "x?"), ("user", "y"), ("model", question)] for question in asked]
    replies = data.rule_users([(pair, each, None) for each in said])
    assert replies == ["2019", "2019", "Net", data.NOTHING_TO_ADD], "both fit in full: the first one asked in the data"
    assert data.rule_users([(Pair("", [], ANSWER, gold[-1:], gold[:1], gold[-1:], "12"), said[1], None)]) == [
        data.NOTHING_TO_ADD
    ]


def test_a_gold_question_of_common_words_alone_fits_any_question():
    gold = [("model", "Which do you mean?"), ("user", "The red."), ("model", "7")]
    pair = Pair("", [("user", "How much?")], CLARIFY, gold, gold[-1:], gold, "7")
    assert data.rule_users([(pair, [("model", "What colour?")], None)]) == ["The red."]


def test_what_a_user_says_who_has_nothing_to_add_is_a_key():
    [reply] = data.rule_users([(PAIR, [("model", "Which club?")], None)], "Dazu kann ich nichts sagen.")
    assert reply == "Dazu kann ich nichts sagen."
    config = act.Config(data_config=act.DataConfig(nothing_to_add="Nichts."))
    answers = act.Helpers(config, {}).answers([PAIR], "drop_f1")
    assert answers["simulate"]([0], [[("model", "Which club?")]]) == ["Nichts."]


def test_question_by_rule_is_that_of_the_first_example():
    assert data.rule_questions([(PAIR, [PAIR, None]), (PAIR, [])]) == ["In which league?", "points?"]
