r"""Texts and code use the field's words: the project's old jargon does not come back, and
the spelling is American.

    python -m tests.docs.test_words FOLDER     prints what is left in a tree

`RULES` is the one table. A row says where it applies, what to say instead, and what is
banned: a regular expression from the start of a word, whose spaces stand for any
whitespace. `names` are identifiers, split at underscores and capitals: `square_size` and
`SquareSize` both read as "square size", and `^` and `$` are the ends of the identifier.
`prose` is pages, docstrings, comments and messages.
"""

import re
import sys
from functools import cache
from pathlib import Path

from tests.helpers.pages import ROOT

RULES = r"""
both   (allowed)                      square (?:\*\*)?(?:MoRA )?(?:matri|root)|(?:least|mean|root|sum of) squares?\b
both   (allowed)                      zero optimisation|whole numbers?\b|learning rates?\b|ring attention|floors?\(
both   (allowed)                      vocabulary pieces|type, whence|learning-rate
names  squared_norm                   square sum$
both   mora_matrix, MoRA matrix, M    squares?\b
names  init_weight                    ^first values?$
both   merged weight                  live (?:\w+ )?weights?\b
both   base weight                    original weights?\b
names  rebuild_weight, rebuild_base   ^form(?: base)?$
names  Delta, Update                  (?-i:^Term$)
names  adapter_weight                 ^value (?:name|shape)$
names  MixtureConfig                  ^mixture plan$
names  full, gathered, unchunked      whole\b
prose  unsharded, complete            whole (?:base|model|weights?|matri|checkpoint|cop)|base whole\b
both   master weights                 masters\b
both   next to, with, in addition to  beside\b
names  LayerPrefetcher                (?-i:(?:base )?rings?\b|BaseRing)
names  event                          tickets?\b
both   validation error               refusals?\b|complain
names  raise_validation_errors        ^refuse$
names  RunContext                     (?-i:^Start$)
names  TrainingSetup                  (?-i:^Job$)
names  MergedModelSource              ^opened run$
both   receive, read                  hear(?:s|d|ing)?\b
names  _stop_if_requested             ^leave if asked$
names  run_on_rank0, is_rank0         ^(?:on|is|is local|gather to) first$
names  abort                          ^leave$
names  set_single_process_env         ^become the only rank$
names  RankManifest                   (?-i:^Share$)
names  unused_options                 ^idle settings$
names  BYTES_PER_SLICE_OVERHEAD       ^worth a slice$
names  bytes_per_merge                ^a merge adds$
names  _NON_ARCHITECTURAL_KEYS        ^not the function$
names  WeightMappingError             ^not one to one$
both   fix                            mend(?:s|ed|ing)?\b
both   delete                         retir(?:e|es|ed|ing)\b
names  stat_signature                 stamps?\b
both   packaged                       ships?\b|shipp(?:ed|ing)\b
both   printed, named, reported       told\b
both   memorized                      (?:known )?by heart\b
prose  learning rate                  (?-i:[Rr]ates?)\b
prose  re-warmup                      ramps?\b|ramp-up\b
prose  tokens                         pieces?\b
prose  the demo                       embedded default\b
prose  multi-adapter inference        adapter bank\b
prose  plain words                    one's own\b|so many\b|whence\b|going home\b
prose  packages, modules              (?:room|house|wing|floor)s?\b
prose  peak                           at the highest\b
prose  static memory                  held all the time\b
both   -ize                           \w*(?:author|capital|categor|character|custom|emphas|equal|factor)is(?:e|ing|a)\w*
both   -ize                           \w*(?:final|general|initial|linear|local|material|memor|minim)is(?:e|ing|a)\w*
both   -ize                           \w*(?:maxim|modular|normal|optim|organ|orthogonal|parallel)is(?:e|ing|a)\w*
both   -ize                           \w*(?:parametr|penal|pickl|priorit|quant|random|real|recogn)is(?:e|ing|a)\w*
both   -ize                           \w*(?:regular|serial|special|stabil|standard|summar|symbol)is(?:e|ing|a)\w*
both   -ize                           \w*(?:synchron|token|util|vector|visual)is(?:e|ing|a)\w*
both   -yze                           \w*(?:anal|paral)ys(?:e\b|e[drs]\b|ing)
both   -or                            (?:behavi|col|fav|flav|harb|hon|hum|lab|neighb|rum|vap)our
both   -er                            (?:cent|fib|lit|theat|(?:centi|kilo|milli)?met)re[sd]?\b
both   -l-                            \w*(?:cancel|channel|label|level|marshal|model|signal|total|travel)l(?:ed|ing|er)
both   license, defense, artifact     licence|defence|offence|artefact
both   catalog, program, gray         catalogue|programmes?\b|judgement|ageing\b|whilst\b|learnt\b|spelt\b|grey
"""
READ = """
*.py *.md docs/**/*.md tools/**/*.md configs/**/*.md configs/**/*.yaml
launch/*.* mora_ds/**/*.py tools/**/*.py tools/**/*.yaml tests/**/*.py tests/**/*.yaml
"""
NOT_READ = ("CHANGELOG.md", "test_words.py")

# Not torch's `.square()`
NAME = r"\b(?!(?<=\.)square_?\()[^\W\d]\w*"
WORD_IN_NAME = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+"
# Not a string of one word, such as a key
PLAIN_WORD = r"(?<!\A.)\b[A-Za-z]?[a-z]+\b|\b[a-z]+\b(?!.\Z)"

STRING = r"""[rbf]{0,2}(?:"{3}.*?"{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
# Comments on lines that follow each other, or strings that Python joins; what is no prose
# in them: keys, the quotes in between, code, values and flags
CODE = (
    rf"(?s)#[^\n]*(?:\s+#[^\n]*)*|{STRING}(?:\s+{STRING})*",
    r"""\A["']\w+["']\Z|["']\s+[rbf]*["']|\n *#|``?[^`\n]+``?|\{[^{}]*\}|--\w+|[\w.]*_\w*""",
)
# All of it; what is no prose: code, comments, links, quoted messages, mathematics
PAGE = (
    r"(?s).+",
    r"(?m)(?s:^```.*?^```$|<!--.*?-->)|``?[^`\n]+``?|\]\([^)]*\)|^(?:>| {4}).*$",
)


def rows_of(place):
    """(term, pattern) of one place's rows, and a pattern with a group for each of them."""
    rows = re.findall(rf"(?m)^(?:{place}|both) +(.+?)  +(.+)", RULES)
    groups = "|".join(rf"\b({pattern})" for _, pattern in rows)
    return rows, re.compile(groups.replace(" ", r"\s+"), re.IGNORECASE)


NAMES = rows_of("names")
PROSE = rows_of("prose")


def banned(text, rules=PROSE):
    """(offset, word, the term to use) of each banned word."""
    rows, pattern = rules
    for word in pattern.finditer(text):
        term, _ = rows[word.lastindex - 1]
        if term != "(allowed)":
            yield word.start(), word[0], term


@cache
def terms_of_name(name):
    """What to say in place of an identifier."""
    words = " ".join(re.findall(WORD_IN_NAME, name))
    return [term for _, _, term in banned(words, NAMES)]


def banned_names(code):
    for name in re.finditer(NAME, code):
        for term in terms_of_name(name[0]):
            yield name.start(), name[0], term


def blanked(pattern, text):
    """The text with spaces in place of what matches: offsets stay the same."""
    return re.sub(pattern, lambda match: re.sub(r"\S", " ", match[0]), text)


def banned_in(source, text, not_prose):
    """Identifiers outside of what `text` matches, identifiers within it that are no plain
    words, and its prose."""
    code = re.sub(text, lambda found: blanked(PLAIN_WORD, found[0]), source)
    yield from banned_names(code)
    for found in re.finditer(text, source):
        for offset, word, term in banned(blanked(not_prose, found[0])):
            yield found.start() + offset, word, term


def findings(root):
    """A line for each banned word in the files of a tree."""
    for path in sorted({path for place in READ.split() for path in root.glob(place)}):
        source = path.read_text() if path.name not in NOT_READ else ""
        texts = PAGE if path.suffix == ".md" else CODE
        for offset, word, term in banned_in(source, *texts):
            line = source.count("\n", 0, offset) + 1
            yield f"{path.relative_to(root)}:{line}: {word!r}: say {term}"


def test_no_banned_word():
    found = "\n".join(findings(ROOT))
    assert not found, found


PROGRAM = '''"""A Square of `told_of` and
a whole
model."""

class SquareSum:  # a comment, and
    # a live weight
    whole_number = x.square() + y.squared
    raise UserError("root mean square of a base "
        f"whole {x.is_first} --pieces, the learning "
        "rate")

def test_a_whole_number_is_tokenised(): masters["its square"]
'''
README = """The `mora_square` is
held all the time.

> told

    square_size: 1 <!-- told -->
"""
FOUND = r"""
README.md:1: 'mora_square': say mora_matrix, MoRA matrix, M
README.md:6: 'square_size': say mora_matrix, MoRA matrix, M
README.md:2: 'held all the time': say static memory
program.py:1: 'told_of': say printed, named, reported
program.py:5: 'SquareSum': say squared_norm
program.py:9: 'is_first': say run_on_rank0, is_rank0
program.py:12: 'test_a_whole_number_is_tokenised': say -ize
program.py:12: 'masters': say master weights
program.py:1: 'Square': say mora_matrix, MoRA matrix, M
program.py:2: 'whole\nmodel': say unsharded, complete
program.py:6: 'live weight': say merged weight
program.py:8: 'base  \n          whole': say unsharded, complete
program.py:12: 'square': say mora_matrix, MoRA matrix, M
"""


def test_banned_words_are_found(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "README.md").write_text(README)
    assert "\n".join(findings(tmp_path)) == FOUND.strip()


if __name__ == "__main__":
    print(*findings(Path(sys.argv[1])), sep="\n")
