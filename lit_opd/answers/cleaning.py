r"""One spelling for one meaning: an answer as people and models write it -> plain LaTeX, words as ``\text{word}``.

Every step keeps the meaning; what could mean two things stays as it is. The order of the steps matters: thousands are
recognised while it is still to be seen whether a space follows a comma, words before spaces are dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from lit_opd.answers.tables import (
    CENT_SIGN,
    COMMAND_WORDS,
    CURRENCIES,
    GREEK,
    INVISIBLE,
    LEADING_WORDS,
    LOWERED,
    NO_MEASURE,
    NOT_IN_UNITS,
    PERCENT_WORDS,
    PLAIN_WORDS,
    RAISED,
    SAME_PHRASES,
    SIGNS,
    SMALL_WORDS,
    SPEEDS,
    UNIT_NAMES,
)

MAX_CHARS = 1000  # a longer text is no short answer and stays as it is: the steps take time that grows with its square
MAX_WRAPPERS = 40  # nested commands around an answer that are taken off

_TEXT_COMMANDS = (
    "text|textrm|textbf|textit|textsf|texttt|textnormal|textup|textsc|textmd|textsl|emph|mbox|hbox|mathrm|operatorname"
)
_MATH_COMMANDS = (
    "boldsymbol|bm|pmb|mathbf|mathit|mathsf|mathtt|mathnormal|boxed|fbox|framebox|underline|ensuremath|mathop|mathord|mathstrut|"
    "smash|cancel|uline|textcolor|colorbox|color|bf|rm|it"
)
_WRAPPER = re.compile(rf"\\(?P<name>{_TEXT_COMMANDS}|{_MATH_COMMANDS})\*?\s*(?P<brace>\{{)")
_COLOURED = re.compile(r"\\(?:textcolor|colorbox|color)\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}")
_DROPPED = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|sf|tt|bfseries|itshape|boldmath|tiny|small|normalsize|large"
    r"|Large|LARGE|huge|Huge|centering|mathstrut|null)(?![a-zA-Z])"
    r"|\\(?:hspace|vspace|phantom|hphantom|vphantom|label|tag)\*?\s*\{[^{}]*\}"
)
_SWITCHED = re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt|bfseries)(?![a-zA-Z])\s*([^{}]*)\}")
_SIZED = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*(\.(?![0-9]))?")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[;:> ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|enspace(?![a-zA-Z])|thinspace(?![a-zA-Z]))|~|\s"
)
_ALIASES = {
    name: to
    for names, to in (
        ("dfrac tfrac cfrac", r"\frac"), ("dbinom tbinom", r"\binom"), ("leq leqslant leqq", r"\le"),
        ("geq geqslant geqq", r"\ge"), ("neq", r"\ne"), ("lt", "<"), ("gt", ">"),
        ("lbrace", r"\{"), ("rbrace", r"\}"), ("lbrack lbracket", "["),
        ("rbrack rbracket", "]"), ("langle", "("), ("rangle", ")"), ("lvert rvert vert mid", "|"), ("varnothing O", r"\emptyset"),
        ("degree textdegree", r"^\circ"), ("dots cdots ldots dotsc dotsb", r"\ldots"), ("infin", r"\infty"), ("ast", r"\cdot"),
        ("lor vee", r" \text{or} "), ("land wedge", r" \text{and} "), ("R Reals reals", r"\mathbb{R}"), ("textdollar", r"\$"),
        ("backslash smallsetminus", r"\setminus"), ("colon", ":"), ("lg", r"\log"),
    )
    for name in names.split()
}  # fmt: skip
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_DOT_OVER = re.compile(r"\\overset\s*\{\s*(?:\.|\\cdot)\s*\}")
_ENVIRONMENT = re.compile(
    r"\\(?:begin|end)\{(?:align|aligned|equation|gather|gathered|split|center|displaymath|math)\*?\}"
)
_CASES = re.compile(r"\\begin\{cases\}([^&]*?)\\end\{cases\}")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\^?\s*\\circ\s*\}|\^?\s*\\circ(?![a-zA-Z]))\s*")
_EMPTY_SET = re.compile(r"\\\{\s*\\\}")
_ROOT = re.compile(r"\\sqrt\s*(\[[^\]]*\])?\s*([0-9a-zA-Z])")

# a comma, thin space or space between groups of three digits
_THOUSANDS = re.compile(
    r"(?<![0-9.,_^])(?<![_^]\{)[1-9][0-9]{0,2}"
    r"(?P<gap>\{,\}|,?\\!,?|,|\\[,; ]|~|[ ])[0-9]{3}(?:(?P=gap)[0-9]{3})*(?![0-9]|,[0-9]|\{,\}|[ ][0-9])"
)
_DECIMAL_COMMA = re.compile(r"(?<![0-9.,])([0-9]+)\{,\}(?=[0-9]+(?![0-9,{]))")
_BAR = r"\\(?:overline|bar|overbar)\s*\{?\s*(?P<bar>[0-9]+)\s*\}?"
_DOTS = r"(?P<dots>\\dot\s*\{?[0-9]\}?(?:\s*[0-9]*\s*\\dot\s*\{?[0-9]\}?)?)"
_REPEATING = re.compile(rf"(?P<whole>[0-9]*)\.(?P<start>[0-9]*)\s*(?:{_BAR}|{_DOTS}|\((?P<round>[0-9]+)\))")
_TRAILING_REPEAT = re.compile(  # bounded: without a bound its time grows with the fourth power of the digits
    r"(?<![0-9])(?P<whole>[0-9]*)\.(?P<start>[0-9]{0,60}?)(?P<bar>[0-9]{1,60}?)(?P=bar){2,}\s*(?:\.\.\.|\\ldots(?![a-zA-Z]))"
)
_COMBINING = re.compile(r"((?:[0-9]\u0305)+)")
_MIXED = re.compile(
    r"(?<![0-9.^_/a-zA-Z)}])(?P<whole>[0-9]+)\s*\\frac\{(?P<over>[0-9]+)\}\{(?P<under>[0-9]+)\}(?!\s*\^)"
)
_MIXED_SLASH = re.compile(
    r"(?<![0-9.^_/a-zA-Z)}])(?P<whole>[0-9]+)(?:\s+|\s*\\,\s*)(?P<over>[0-9]+)\s*/\s*(?P<under>[0-9]+)(?![0-9.^/])"
)
_GAP = r"(?:\s|\\[ ,;:]|~)*"
_CHOICE_IN_TEXT = re.compile(
    rf"^\s*\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{{{_GAP}(?:\((?P<a>[A-J])\)|(?P<b>[A-J])[.):])(?P<in>{_GAP})[.:]?\s*"
    rf"\}}(?P<out>{_GAP})(?P<minus>-?)(?=[^}}]*[0-9a-zA-Z])(?![+*/^_=,;)<>&])"
)
_NO_OPERATOR = r"(?!\\(?:cup|cap|in|le|ge|ne|to|subset|times|cdot|pm|mp|setminus|text\{(?:and|or))(?![a-zA-Z]))"
_CHOICE = re.compile(
    rf"^\s*(?:\((?P<a>[A-J])\)[.:]?|(?P<b>[A-J])[.):]){_GAP}(?<=[ ,;:~]){_NO_OPERATOR}(?=[0-9\\$.]|[a-zA-Z]{{2}})"
)
_HALF_DAY = re.compile(r"(?<![a-zA-Z\\])([aApP])\s*\.?\s*[mM](?![a-zA-Z])\.?")
_HALF_DAY_BEHIND = re.compile(r"(?<=[0-9])\s*([aApP])\s*\.?\s*[mM](?![a-zA-Z0-9^_])\.?")
_WORD = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]+")
_ORDINAL = re.compile(r"(?<=[0-9])(st|nd|rd|th)(?![a-zA-Z])")
_NAMED = frozenset("\\text \\begin \\end \\mathbb \\choice".split())  # what is in their braces is a name
_PER = re.compile(r"(?<=[0-9}) ])(m|g|L)\s*/\s*(s|h|L|m)(?![a-zA-Z])")
_LEAD = re.compile(r"^(?:\s*\\text\{[a-zA-Z]+\})+\s*[:=]?\s*")
_WORD_IN_LEAD = re.compile(r"\\text\{([a-zA-Z]+)\}")
_KNOWN_WORDS = NOT_IN_UNITS | LEADING_WORDS | PLAIN_WORDS
_SHORT_WORDS = frozenset("is no so to we".split())
_VOWEL = re.compile("[aeiou]")


@lru_cache(maxsize=8192)
def cleaned(answer: str) -> str:
    r"""The answer in one spelling.

    >>> cleaned(r"$\boldsymbol{2\dfrac12}$."), cleaned("2\u221a3 cm")
    ('\\frac{5}{2}', '2\\sqrt{3} \\text{cm}')
    """
    if len(answer) > MAX_CHARS:
        return answer
    text = _from_unicode(answer)
    for step in _STEPS:
        text = step(text)
    return text


def canonical(answer: str) -> str:
    r"""The cleaned answer without spaces and word marks, words in lower case: equal texts are equal answers.

    >>> canonical(r"\text{East}"), canonical("1, 234"), canonical("3 4")
    ('east', '1,234', '3 4')
    """
    return compact(cleaned(answer))


@lru_cache(maxsize=8192)
def compact(text: str) -> str:
    """The same of a text that is clean already."""
    text = re.sub(r"\\text\{([a-zA-Z]+)\}", lambda found: found[1].lower(), text)
    text = re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", r"\1@", text)  # \pi r is no command \pir
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).replace("+\\infty", "\\infty")
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text).replace("@", " ")
    return SAME_PHRASES.get(text, text)


def enclosed(text: str, start: int, opening: str = "{", closing: str = "}") -> int:
    """The place of the bracket that closes the one at ``start``, -1 where none does; escaped ones do not count."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += (text[place] == opening) - (text[place] == closing)
        if depth == 0:
            return place
        place += 1
    return -1


# -- steps -------------------------------------------------------------------------------------------------------------


def _from_unicode(text: str) -> str:
    text = unicodedata.normalize("NFC", text).translate(INVISIBLE)
    if text.isascii():
        return text
    text = _COMBINING.sub(lambda found: "\\overline{" + found[1].replace("\u0305", "") + "}", text)
    text = _script(text, RAISED, "^")
    text = _script(text, LOWERED, "_")
    text = re.sub(
        "[\u221a\u221b\u221c]",
        lambda sign: {"\u221a": "\\sqrt ", "\u221b": "\\sqrt[3] "}.get(sign[0], "\\sqrt[4] "),
        text,
    )
    text = re.sub(r"(\\sqrt(?:\[[34]\])?) *([0-9.]{2,})", r"\1{\2}", text)
    out = []
    for sign in text:
        if sign in SIGNS or sign in GREEK:
            out.append(SIGNS.get(sign) or f"\\{GREEK[sign]} ")
        elif sign in CURRENCIES or sign == CENT_SIGN or sign.isascii():
            out.append(sign)
        else:
            out.append(_plain(sign))
    return "".join(out)


def _plain(sign: str) -> str:
    r"""Full-width and styled letters as ASCII, one half as ``\frac{1}{2}``."""
    plain = unicodedata.normalize("NFKC", sign)
    if "\u2044" in plain:
        over, under = plain.split("\u2044")
        return f"\\frac{{{over}}}{{{under}}}" if over and under else plain
    if plain == sign:
        return sign
    return "".join(SIGNS.get(one) or (f"\\{GREEK[one]} " if one in GREEK else one) for one in plain)


def _script(text: str, table: dict[str, str], mark: str) -> str:
    signs = "".join(table)
    return re.sub(f"[{signs}]+", lambda found: f"{mark}{{{''.join(table[sign] for sign in found[0])}}}", text)


def _without_delimiters(text: str) -> str:
    """Dollar signs around mathematics, Markdown around anything; a single dollar sign is money."""
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\[()\[\]]", r"\1 ", text).strip()
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    else:
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    for mark in ("**", "__", "`", "*", "_"):
        stripped = text.strip().rstrip(".")
        if stripped.startswith(mark) and stripped.endswith(mark) and len(stripped) > 2 * len(mark):
            text = stripped[len(mark) : -len(mark)]
    return text.replace("**", "^").replace('"', "").replace("\\textquotedbl", "").replace("``", "").replace("''", "")


def _one_name(text: str) -> str:
    """One command for one meaning; spacing and sizing commands dropped."""
    text = _SWITCHED.sub(r"\\mathrm{\1}", text)
    text = _SIZED.sub(" ", _DROPPED.sub(" ", _COLOURED.sub(" ", text)))
    text = _COMMAND.sub(lambda found: _ALIASES.get(found[1], found[0]), _DOT_OVER.sub(r"\\dot", text))
    text = _CASES.sub(lambda found: found[1].replace("\\\\", ", "), text)
    if _ENVIRONMENT.search(text):
        text = _ENVIRONMENT.sub(" ", text).replace("&", " ")
    text = re.sub(r"\{\s*([:=<>])\s*\}", r"\1", text)
    text = text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("\\%", "%").replace("=<", "\\le ")
    return _EMPTY_SET.sub(r"\\emptyset", _DEGREE.sub(r"^\\circ ", text))


def _choices(text: str) -> str:
    r"""A choice's letter in front of its content becomes ``\choice{C}``."""
    text = text.strip()
    found = _CHOICE_IN_TEXT.match(text) or _CHOICE.match(text)
    if found is None or found.groupdict().get("minus") and not (found["in"] or found["out"]):  # (C)-1 is a difference
        return text
    letter = found["a"] or found["b"]
    return f"\\choice{{{letter}}} {found.groupdict().get('minus') or ''}{text[found.end() :]}"


def _unwrapped(text: str) -> str:
    """Commands that change the looks taken off, innermost text read word by word."""
    for _ in range(MAX_WRAPPERS):
        found = _WRAPPER.search(text)
        if found is None:
            break
        end = enclosed(text, found.start("brace"))
        if end < 0:
            break
        inner = text[found.end() : end]
        if re.fullmatch(_TEXT_COMMANDS, found["name"]):
            inner = _words_of_text(inner)
        elif re.search(r"[\^_]\s*$", text[: found.start()]):
            inner = f"{{{inner}}}"
        text = text[: found.start()] + inner + text[end + 1 :]
    return re.sub("\x03\\s+(?=\\^)", "\x03", text).replace("\x02", "\\text{").replace("\x03", "}")


def _words_of_text(text: str) -> str:
    """The content of a text command: words are marked, for now by control signs; single letters are symbols."""
    text = (
        _HALF_DAY.sub(lambda found: f" \x02{found[1].lower()}m\x03 ", text)
        if re.search(r"[aApP]\s*\.?\s*[mM]", text)
        else text
    )
    return _WORD_OUTSIDE.sub(_marked, text)


_WORD_OUTSIDE = re.compile(r"\\[a-zA-Z]+|\x02[^\x03]*\x03|[a-zA-Z]+")


def _marked(found: re.Match[str]) -> str:
    word = found[0]
    if word[0] in "\\\x02":
        return word
    if word in COMMAND_WORDS and word not in UNIT_NAMES:
        return COMMAND_WORDS[word]
    if len(word) > 1 or word in UNIT_NAMES:
        return f" \x02{word}\x03 " if len(word) > 1 else f"\x02{word}\x03"
    return word


def _thousands(text: str) -> str:
    """1,234 is a number, "1, 234" a list; inside brackets a comma separates, unless a space follows other commas there."""
    depth = _depths(text)
    spaced = re.search(r",\s", text) is not None

    def joined(found: re.Match[str]) -> str:
        gap = found["gap"]
        if gap == "," and depth[found.start()] and not spaced:
            return found[0]
        return re.sub(r"[^0-9]", "", found[0])

    return _DECIMAL_COMMA.sub(r"\1.", _THOUSANDS.sub(joined, text))


def _depths(text: str) -> list[int]:
    depths, depth = [], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        depths.append(depth)
    for found in re.finditer(r"\\\{.*?\\\}", text):
        for place in range(found.start(), found.end()):
            depths[place] += 1
    return depths


def _spaces(text: str) -> str:
    text = re.sub(r"\s*([\^_])\s*", r"\1", re.sub(r"\\!", "", text))
    return re.sub(r" +", " ", _SPACES.sub(" ", text.replace("\\,", " "))).strip()


def _bare_words(text: str) -> str:
    r"""Words written without a text command, function names without a backslash."""
    text = _HALF_DAY_BEHIND.sub(lambda found: f" \\text{{{found[1].lower()}m}} ", text)
    text = _ORDINAL.sub(r"\\text{\1}", _PER.sub(r"\\text{\1}/\\text{\2}", text))
    out, place = [], 0
    for found in _WORD.finditer(text):
        if found.start() < place:
            continue
        word, end = found[0], found.end()
        if word in _NAMED and text[end : end + 1] == "{":
            end = text.find("}", end) + 1 or len(text)
            out.append(text[place:end])
        else:
            out.append(text[place : found.start()] + _bare(word, text[: found.start()], text[end:]))
        place = end
    return re.sub(r" +(?=[\^_])", "", re.sub(r" +", " ", "".join(out) + text[place:])).strip()


def _bare(word: str, before: str, behind: str) -> str:
    r"""A run of letters: a command, a word, or symbols side by side."""
    if word[0] == "\\" or len(word) == 1:
        return word
    if word in ("sec", "min") and re.search(r"[0-9}]\s*$", before) and not re.match(r"\s*[\w({\\]", behind):
        return f" \\text{{{word}}} "
    if word in COMMAND_WORDS:
        return COMMAND_WORDS[word]
    lower = word.lower()
    behind_number = re.search(r"[0-9}).]\s*$|\\text\{[^}]*\}\s*$|/\s*$|\\pi\s*$", before) is not None
    known = word in UNIT_NAMES or word in SPEEDS or word in NO_MEASURE or lower in PERCENT_WORDS
    if (known and word != "in" and behind_number) or lower in ("and", "or"):
        return f" \\text{{{word}}} "
    if re.match(r"\s*\\text\{", behind) and lower in SMALL_WORDS | LEADING_WORDS:
        return f" \\text{{{word}}} "
    if len(word) >= 3 and lower in _KNOWN_WORDS:
        return f" \\text{{{word}}} "
    if lower in _SHORT_WORDS and re.search(r"(^|\s)$", before) and re.match(r"[\s:]|$", behind):
        return f" \\text{{{word}}} "
    looks_plain = len(word) >= 4 and _VOWEL.search(lower) and (word.islower() or word.istitle() or word.isupper())
    return f" \\text{{{word}}} " if looks_plain else word


def _fractions(text: str) -> str:
    r"""``\frac12`` with braces, roots too; repeating decimals and mixed numbers as fractions."""
    text = _with_braces(text)
    text = _TRAILING_REPEAT.sub(_repeating, _REPEATING.sub(_repeating, text))
    text = re.sub(r"\.\.\.+", r"\\ldots ", text)
    return _MIXED_SLASH.sub(_mixed, _MIXED.sub(_mixed, text))


def _with_braces(text: str) -> str:
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*(?=[{\\])", r"\\frac{\1}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*([0-9a-zA-Z])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})\s+\{", r"\\frac\1{", re.sub(r"\\frac\s+\{", r"\\frac{", text))
    text = re.sub(r"\\binom\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\binom{\1}{\2}", text)
    text = _ROOT.sub(lambda found: f"\\sqrt{found[1] or ''}{{{found[2]}}}", text)
    text = re.sub(r"\\sqrt\s*(\[[^\]]*\])?\s*(\\pi|\\[a-z]+(?![a-zA-Z{]))", r"\\sqrt\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\[[^\]]*\])?\s+\{", r"\\sqrt\1{", text)
    while (found := re.search(r"\\sqrt(?:\[[^\]]*\])?\s*\(", text)) and (
        end := enclosed(text, found.end() - 1, "(", ")")
    ) > 0:
        text = f"{text[: found.end() - 1].rstrip()}{{{text[found.end() : end]}}}{text[end + 1 :]}"
    return text


def _repeating(found: re.Match[str]) -> str:
    groups = found.groupdict()
    block = groups.get("bar") or groups.get("round") or re.sub(r"[^0-9]", "", groups.get("dots") or "")
    start, whole = found["start"], found["whole"] or "0"
    exact = Fraction(int(whole + start)) + Fraction(int(block), 10 ** len(block) - 1)
    exact /= 10 ** len(start)
    return f"\\frac{{{exact.numerator}}}{{{exact.denominator}}}"


def _mixed(found: re.Match[str]) -> str:
    """Whole part and proper fraction side by side; an improper one is a product or a slip, and stays."""
    whole, over, under = (int(found[name]) for name in ("whole", "over", "under"))
    return f"\\frac{{{whole * under + over}}}{{{under}}}" if 0 < over < under else found[0]


def _without_lead(text: str) -> str:
    """ "The answer is", "Answer:", "x =" in words; the full stop at the end."""
    text = _stripped(text)
    found = _LEAD.match(text)
    if found and text[found.end() :].strip():
        words = [word.lower() for word in _WORD_IN_LEAD.findall(found[0])]
        if all(word in LEADING_WORDS for word in words) or found[0].rstrip().endswith((":", "=")):
            text = text[found.end() :]
    return _stripped(text)


def _stripped(text: str) -> str:
    """Without braces around the whole, and without what ends a sentence."""
    while True:
        before = text
        text = re.sub(r"^(?:[:=]\s*)+", "", _without_stop(text.strip()))
        if text.startswith("{") and enclosed(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


def _without_stop(text: str) -> str:
    r"""Without the stops and spaces at its end; the sign after a backslash is a command's, as in ``\,``."""
    end = len(text)
    while end and (text[end - 1] in ".,;:" or text[end - 1].isspace()):
        end -= 1
    return text[: end + 1] if end and text[end - 1] == "\\" else text[:end]


_STEPS: tuple[Callable[[str], str], ...] = (
    _without_delimiters,
    _one_name,
    _choices,
    _unwrapped,
    _choices,
    _thousands,
    _spaces,
    _fractions,
    _stripped,
    _bare_words,
    _fractions,
    _without_lead,
)
