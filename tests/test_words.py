"""No string of the programs and no page says what a reader stumbles over: the words are those of AWS, MQTT and git."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from harness import ROOT

PROGRAMS = [ROOT / name for name in ("elf.py", "iot_elf/local_aws.py", "locustfile.py")]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *(ROOT / "docs").glob("*.md")]

STUMBLING = [  # a pattern, a sentence that it finds, and what is said instead
    (
        r"no line for each|asks for it",
        "27 things: no line for each, unless --verbose asks for it",
        "showing totals only",
    ),
    (r"not any more", "others could read X: not any more", "other users could read X: made private"),
    (r"the same command again goes", "the same command again goes on", "run the same command again to continue"),
    (r"\bunder way\b", "finishing the calls under way", "stopping (up to 4 s)"),
    (r"again stops at once", "Ctrl-C again stops at once", "press Ctrl-C again to stop now"),
    (r"stopped by SIG", "stopped by SIGINT", "interrupted (Ctrl-C)"),
    (
        r"acknowledged within|behind schedule",
        "acknowledged within 1.9 ms",
        "ack latency: p50 1.9 ms; sent up to 1 ms late",
    ),
    (r"after the time in", "received, after the time in their ts, within", "delivery latency (from ts, ±1 ms)"),
    (r"\bdeaf\b", "how long it was deaf", "how long it was disconnected"),
    (r"its connection \w+( \w+)? again", "has its connection to Y again", "reconnected to Y"),
    (r"messages? more\b", "not acknowledged: 5 messages more", "5 more messages not acknowledged"),
    (
        r"that it forgot|(takes?|took) (up its|up the|them up)|that a \w+ \w+ takes up",
        "that it forgot",
        "a larger COUNT adopts them",
    ),
    (r"never got|nobody has\b", "N calls never got an answer", "N certificate requests got no answer"),
    (r"there is none:|none was made", "there is none: none was made, or it is gone again", "none found"),
    (r"\bmid-\w+", "an elf.py ended in mid-work", "recovered N changes from a run that was interrupted"),
    (r"can't be had", "credentials can't be had", "could not get AWS credentials"),
    (
        r"(?<!there) is no (region|topic|file|JSON|root|text|error|proxy|terminal|thing|address|object)\b",
        "that is no region",
        "not a valid region",
    ),
    (r"none that", "in region X, which is none that is known", "X is not a known region"),
    (r"other means", "taken away by other means", "deleted by someone else"),
    (r"let it go\b", "AWS does not let it go", "AWS refuses to delete it"),
    (r"\bin force\b", "is not in force everywhere", "may not have taken effect yet"),
    (r"\bfor good\b", "revoked, for good", "revoked and cannot be reactivated"),
    (r"\bmend(s|ed|ing)?\b", "mend what is named", "fix"),
    (r"\banew\b|\bafresh\b", "make the fleet anew", "recreate the fleet"),
    (r"\bcontradict", "X contradicts where the fleet lives", "X does not match"),
    (r"\bso long\b|\bso many\b|\bso often\b", "wait so long", "seconds to wait"),
    (r"a message every|a line every", "a message every; for so long", "seconds between messages"),
    (r"output, too", "one object a line on standard output, too", "also print JSON lines to standard output"),
    (r"(are|is) asked for\b", "N users are asked for", "N users requested"),
    (r"in short\b", "say it all in short", "give a short summary"),
    (r"shall be\b|, or shall\b", "says what there shall be", "sets the total"),
    (r"(become|became|becomes) of\b", "what becomes of them", "one log line per thing and message"),
    (r"\bwho read\w* the output", "who read the output has gone", "the reader of the output closed it"),
    (r"is made to run", "ELF is made to run on Windows", "expected to work"),
    (r"a dead one's do not", "a dead one's do not block", "locks of crashed runs are ignored"),
    (r"\bgo(es|ing)? on\b", "the others go on", "the others continue"),
    (r"\b(is|are|was|were) to be\b", "what is to be sent", "what will be sent"),
    (r"\b(an?|and|with|has) [\w ]{1,20} of (its|their|your) own\b", "a certificate of its own", "its own certificate"),
    (r"\bat the (least|most|longest|worst)\b", "4 seconds at the most", "at most 4 seconds"),
    (r"(?<!left)(?<!leave it)(?<!leaves it) alone\b", "for its owner alone", "only for its owner"),
    (r"\b(takes?|took|taken) (\w+ )?(\w+ )?away\b", "takes it all away", "deletes"),
    (r"makes? anything of", "can't make anything of a message", "could not read a message"),
    (r"goes around|go around", "NO_PROXY goes around it", "NO_PROXY bypasses it"),
    (r"opens (TLS|connections)", "a proxy that opens TLS", "a proxy that intercepts TLS"),
    (r"\bwant(s|ed) an?\b", "wants a user and a password", "requires a user and a password"),
    (r"\bbe it\b", "be it ready or not", "ready or not"),
    (r"things a second to make", "things a second to make or clean", "things per second to create, authorise or clean"),
    (r"a log line each|on Windows itself", "a log line each for them", "one log line per thing and message"),
]


@functools.cache
def texts_of(path: Path) -> list[str]:
    """Return the text of a page, or the strings of a program, with docstrings and the constant parts of f-strings."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [" ".join(source.split())]
    texts, inside = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            texts.append(" ".join(node.value.split()))
    return texts


@pytest.mark.parametrize(("pattern", "example", "instead"), STUMBLING, ids=[pattern for pattern, *_ in STUMBLING])
def test_nothing_that_a_reader_stumbles_over_is_said(pattern: str, example: str, instead: str) -> None:
    found = [
        f"{path.name}: {text[max(0, match.start() - 40) : match.end() + 40]}"
        for path in (*PROGRAMS, *PAGES)
        for text in texts_of(path)
        for match in re.finditer(pattern, text)
    ]
    assert re.search(pattern, example)
    assert not found, f"say it as in: {instead}"
