"""Build the training text and the tokenizer of the small embedded checkpoint, reproducibly.

The text comes from freely licensed English Debian 12 packages: downloaded with ``apt-get download``, unpacked into
a temporary folder, stripped of markup, listings and tables, cut into long documents, about 3 % of them held out.
OUT gets tokenizer.json (byte-level BPE, 2048 entries), {train,val}.npy (uint16; a document is ``]~!b[``, its text,
``[e~[``), {train,val}_offsets.npy (int64, documents + 1) and sources.json (origin, licence, size of each source).
"""

import argparse
import html
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

VOCAB = 2048
SPECIAL = (
    "]!p~[",
    "]~b]",
    "[e~[",
    "]!d~[",
    "]<]image[>[",
    "]<]video[>[",
    "]<]start of image[>[",
    "]<]end of image[>[",
    "]<]start of video[>[",
    "]<]end of video[>[",
    "]<]vision pad[>[",
    "]~!b[",
)
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "]<]minimax[>[", "<mm:think>", "</mm:think>")
Pieces = dict[str, list[str]]  # what a reader makes of one file: title -> paragraphs
ADDED = SPECIAL + NOT_SPECIAL  # the highest ids, in this order
_UP, _LOW, _ABBR = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+{_ABBR}|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*{_ABBR}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

DOC_MIN, DOC_MAX = 32_000, 110_000  # characters: short neighbours are joined, longer documents cut
HELD_MIN, HELD_SHARE = 24 * 1024, 0.036  # only documents of more bytes than this are held out
HELD_BOOKS = ("Nehemiah", "1 Corinthians", "2 Corinthians")  # of the Bible: held out in both translations
CAPS = {"linux-doc-6.1": 10_000_000, "dict-gcide": 7_500_000}  # bytes: more is thinned out evenly
# Packages | licence | what the (first) copyright file must say | reader | files below /usr | but not these
SOURCES = r"""
bible-kjv-text bible-kjv | public domain (KJV text) | text of the Bible is expired | kjv | lib/bible.data
sword-text-web | public domain | License: public-domain | web | share/sword/modules/texts/ztext/*/*.bzs
jargon-text | public domain | is in the public domain | jargon | share/doc/jargon-text/jargon.txt.gz
debian-handbook | GPL-2+ or CC-BY-SA-3.0 | CC-BY-SA-3.0 | page | share/doc/debian-handbook/html/en-US/*.html
debian-reference-en | GPL-2+ | License: GPL-2\+ | page | share/debian-reference/*.en.html
installation-guide-amd64 | GPL-2 | GNU GPL, version 2 | page | share/doc/installation-guide-amd64/en/*.html
developers-reference | GPL-2+ | License: GPL-2 | page | share/developers-reference/*.html
debian-policy | GPL-2+ | License: GPL-2\+ | page | share/doc/debian-policy/policy.html/*.html
harden-doc | GPL-2 | License: GPL-2 | page | share/doc/harden-doc/html/en-US/*.html
exim4-doc-html | GPL-2+ | GPL v2\+ | page | share/doc/exim4-doc-html/spec_html/*.html
git-doc | GPL-2 | License: GPL-2 | page | share/doc/git-doc/**/*.html
postgresql-doc-15 | PostgreSQL licence | License: PostgreSQL | page | share/doc/postgresql-doc-15/html/*.html
apache2-doc | Apache-2.0 | License: Apache-2.0 | page | share/doc/apache2-doc/manual/en/**/*.html | license|quick
python-django-doc | BSD-3-Clause | BSD-3 | page | share/doc/python-django-doc/html/**/*.html | _modules|genindex
python3.11-doc | PSF-2 | PYTHON SOFTWARE FOUNDATION | page | share/doc/python3.11/html/**/*.html | changelog|license
sqlite3-doc | public domain | License: public-domain | page | share/doc/sqlite3/*.html | agreement
linux-doc-6.1 | GPL-2 | License: GPL-2 | page | share/doc/linux-doc-6.1/html/**/*.html | translations|ABI|bindings
endless-sky-data | GPL-3+ | License: GPL-3\+ | game | share/games/endless-sky/data/**/*.txt
dict-gcide | GPL-2+ | GNU General Public License | gcide | share/dictd/gcide.dict.dz
"""

_CHARS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u2014\u2015", " -- "),
        "\u2026": "...",
        **dict.fromkeys("\u00b6\u00ad\u200b\u200c\u200d\u2060\ufeff\ufffd\u2022\u2023", ""),
        "\u2192": "->",
    }
)
_COMMON = frozenset(
    "the of to a and in is for that be it with are you this by not on or as an was were he his they i from have had no "
    "who will can may if but at all which when your my we she her him them what there do so one shall any must".split()
)
_CRUDE = re.compile(r"(?i)\b(?:fuck|cunt|nigg|negro|fag|shit|rape[sd]?\b|whore|slut|penis|porn|sperm|vagin|coit)")


def norm(text: str) -> str:
    """One line: plain quotes and dashes, single spaces, composed characters."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text.translate(_CHARS)))
    return re.sub(r" +([.,;:!?](?: |$))", r"\1", text).strip()


def is_prose(text: str, least: int = 8) -> bool:
    """Whether a paragraph reads as English sentences rather than as code, names or a table row."""
    words = text.split()
    if len(words) < least or len(text) > 9 * len(words):
        return False
    plain = sum(c.isascii() and (c.isalpha() or c in " ,.'") for c in text)
    common = sum(w.strip(".,;:!?()\"'").lower() in _COMMON for w in words)
    return plain >= 0.9 * len(text) and common >= 0.2 * len(words)


def prose(blocks: Iterable[tuple[str, bool]], least: int = 8) -> list[str]:
    """(text, is heading) pairs -> prose paragraphs; a heading stays only if prose follows it."""
    out, head = [], ""
    for raw, heading in blocks:
        text = norm(raw)
        if heading:
            text = re.sub(r"^(?:(?:Chapter|Appendix|Part) )?(?:[A-Z]\.)?[\dIVX.]+[.:]? |#$", "", text).strip(" #")
            head = text if len(text) < 90 and re.match(r"\w.*[a-z]{3}", text) else ""
        elif is_prose(text, least):
            if not re.search(r"[.!?][\"')]*$", text):  # drop a lead-in ("For example:") whose listing is gone
                ends = [m.end() for m in re.finditer(r"[.!?][\"')]*(?= [A-Z\"'(])", text)]
                text = text[: ends[-1]] if ends else ""
            if len(text.split()) >= least:
                out += [head, text] if head else [text]
                head = ""
    return out


def page(path: Path) -> Pieces:
    """The prose of one HTML page, without navigation, listings and tables."""
    text = path.read_text("utf-8", "replace")
    text = text[max((m.start() for m in re.finditer(r"<main\b|role=\"main\"|<body\b", text)), default=0) :]
    text = re.split(r"</main>|class=\"(?:sphinxsidebar|navfooter|footnotes|footer)\"", text, maxsplit=1)[0]
    text = re.sub(
        r"<!--.*?-->|<(script|style|pre|table|nav|svg|math|footer|sup)\b.*?</\1>|"
        r"<a class=\"headerlink\".*?</a>",
        " ",
        text,
        flags=re.S | re.I,
    )
    parts = re.split(r"<(/?)(p|li|d[dtl]|h[1-6]|blockquote|div|[uo]l|section|hr|t[rd])\b[^>]*>", text, flags=re.I)
    blocks = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {
        path.name: prose(
            (html.unescape(re.sub(r"<[^>]*>?", "", body)), not closing and tag[-1].isdigit())
            for closing, tag, body in blocks
        )
    }


def jargon(path: Path) -> Pieces:
    """The Jargon File: its essays, and its entries as 'word, n.' and the paragraphs below."""
    text = zlib.decompress(path.read_bytes(), 31).decode()
    text = re.sub(r"[{}]|(?<=\n   )\[[a-z ]*\] ", "", text[text.rindex("Hacker Slang and Hacker Culture") :])
    entry = re.compile(r"\s*:([^:]+):,?(?: /[^/]*/,?)*\s*((?:[a-z]+\.(?:,|/)?\s*)*)")
    return {
        "": prose(
            (f"{m[1]}, {m[2]}".rstrip(", ") if (m := entry.match(block)) else block, bool(m))
            for block in re.split(r"\n\s*\n", text)
        )
    }


def game(path: Path) -> Pieces:
    """The stories and descriptions in a data file of the game Endless Sky."""
    text = path.read_text("utf-8", "replace").replace("<last>", "Hale")
    quoted = map("".join, re.findall(r'(?m)^\s*(?:[a-z ]+ )?(?:`([^`]{40,})`|"([^"]{40,})")\s*$', text))
    return {path.name: [t for t in map(norm, quoted) if is_prose(t, 6) and re.fullmatch('[^<>{}]*[.!?"]', t)]}


def gcide(path: Path) -> Pieces:
    """Dictionary entries as 'Headword, n. Definition.'; quotations, etymologies, synonyms and notes dropped."""
    out = []
    text = zlib.decompress(path.read_bytes(), 31).decode("utf-8", "replace")
    for entry in re.split(r"\n(?=\S[^\n\\]* \\)", text)[50:]:
        head = re.match(r"([A-Za-z][A-Za-z' -]+) \\[^\\]*\\,? ?((?:[a-z]+\.[ ;&]*)+)", entry)
        if not head or re.search(r"(?i)offensive|disparag|derogat|vulgar|obscene|\[low|sexual|lewd", entry):
            continue
        entry = re.sub(r"\[(?:[^][]|\[(?:[^][]|\[[^][]*\])*\])*\]", "", entry)
        senses = []
        for block in re.split(r"\n\s*\n|\n(?=   +(?:\d+|\([a-z]\))[. ])", entry[entry.find("\n   ") :].rstrip()):
            if not re.match(r"\s*(?:Syn:|Note:|[{[(]|--)| {6}", block.strip("\n")):
                block = re.sub(r"(?s)\((?:[A-Z][a-z]+\.?[ &]*)+\)|[{}]|--[A-Z][^\n]*|\bSee .*|\n {9}.*", " ", block)
                block = norm(re.sub(r"^\s*\d+\.", "", block))
                if is_prose(block, 5) and len(block) > 30 and block[-1] == "." and not re.search(r"[]=\\^`[]", block):
                    senses.append(block)
        if senses:
            out.append(f"{head[1]}, {head[2].strip(' ;&')} {' '.join(senses[:4])}")
    return {"": out}


def books(texts: Iterable[tuple[str, str]]) -> Pieces:
    """(chapter heading or '', line) pairs -> books of paragraphs, short lines run together."""
    out: Pieces = {}
    for chapter, line in texts:
        if chapter:
            book = out.setdefault(chapter.rpartition(" ")[0], [])
            book += [chapter, ""]
        elif out and (line := norm(re.sub(r"[][{}]", "", line))):
            if len(book[-1]) > 500 and book[-1][-1] in ".?!\"'":
                book.append("")
            book[-1] = f"{book[-1]} {line}".strip()
    return out


def kjv(path: Path) -> Pieces:
    """The King James Bible, as the reader of the package bible-kjv prints it."""
    run = subprocess.run(
        [path.parents[1] / "bin/bible", "-p", path.parent, "-l1000", "gen1:1-rev22:21"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return books(re.findall(r"^(?:(\S.* \d+)| +\d+ (.*))$", run.stdout, re.M))


def web(path: Path) -> Pieces:
    """The World English Bible, from a SWORD module: zlib blocks of OSIS markup, one a book."""
    data, lines, name = path.with_suffix(".bzz").read_bytes(), [], ""
    for start, size, _ in struct.iter_unpack("<III", path.read_bytes()):
        osis = zlib.decompress(data[start : start + size]).decode()
        osis = re.sub(r"<(note|title)\b.*?</\1>", " ", osis, flags=re.S)
        osis = re.sub(r"</?(?:w|q|hi|divineName|transChange|seg|foreign)\b[^>]*>", "", osis)
        token = r'<milestone n="([^"]*)" type="x-usfm-h"[^>]*>|<chapter [^>]*?n="(\d+)"[^>]*?sID[^>]*>|<[^>]*>|([^<>]+)'
        for title, number, text in re.findall(token, osis):
            name = title or name
            lines.append((number and f"{name} {number}", html.unescape(text)))
    return books(lines)


def unpack(package: str, debs: Path, folder: str) -> str:
    """Unpack the package's .deb, downloaded into `debs` unless it is there; returns its version."""
    if not (have := sorted(debs.glob(f"{package}_*.deb"))):
        run = subprocess.run(["apt-get", "download", "-q", package], cwd=debs, capture_output=True, text=True)
        if not (have := sorted(debs.glob(f"{package}_*.deb"))):
            sys.exit(f"tiny_corpus: package {package} is not available: {' '.join(run.stderr.split())[-200:]}")
    subprocess.run(["dpkg-deb", "-x", have[-1], folder], check=True)
    return subprocess.check_output(["dpkg-deb", "-f", have[-1], "Version"], text=True).strip()


def documents(pieces: Iterable[tuple[str, list[str]]], seen: set[str]) -> Iterator[tuple[str, str]]:
    """(title, text) of documents: pieces joined or cut to length, no paragraph twice."""
    title, held, size = "", [], 0
    for name, texts in itertools.chain(pieces, [("", [""])]):
        for i, text in enumerate(texts):
            if text not in seen and not _CRUDE.search(text):
                seen.update([text] if len(text) > 40 else [])
                title, size = title or name, size + len(text) + 2
                held.append(text)
            if size > (DOC_MAX if i + 1 < len(texts) else DOC_MIN if name else 2000):
                yield title, "\n\n".join(held).strip()
                title, held, size = "", [], 0


def spread(items: list, share: float) -> list:
    """About `share` of the items, evenly spaced, at least one."""
    count = max(1, round(len(items) * share))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)] if items else []


def gather(line: str, debs: Path, seen: set[str]) -> tuple[dict[str, list[str]], dict]:
    """One line of SOURCES -> its documents by part, and its record for sources.json."""
    names, licence, evidence, reader, files, skip, *_ = [*line.split(" | "), "", ""]
    name = names.split()[0]
    with tempfile.TemporaryDirectory() as folder:
        versions = {package: unpack(package, debs, folder) for package in names.split()}
        rights = Path(folder, "usr/share/doc", name, "copyright")
        if not rights.is_file() or not re.search(evidence, " ".join(rights.read_text(errors="replace").split())):
            sys.exit(f"tiny_corpus: {name}: its copyright file does not say {evidence!r}: check the licence")
        paths = [p for p in sorted(Path(folder, "usr").glob(files)) if not re.search(skip or "$^", str(p))]
        docs = list(documents((piece for p in paths for piece in globals()[reader](p).items()), seen))
    size = sum(len(text.encode()) for _, text in docs)
    docs = spread(docs, min(1, CAPS.get(name, size) / max(1, size)))
    if not docs:
        sys.exit(f"tiny_corpus: {name}: no text found: the package's layout has changed")
    long = [doc for doc in docs if len(doc[1].encode()) > HELD_MIN]
    held = [d for d in docs if d[0] in HELD_BOOKS] or (spread(long, HELD_SHARE) if len(docs) > 3 else [])
    record = {
        "packages": versions,
        "licence": licence,
        "used": files + (skip and f" except {skip}"),
        "tokens": 0,
        "documents": len(docs),
        "held_out": len(held),
        "bytes": sum(len(text.encode()) for _, text in docs),
    }
    return {"train": [doc[1] for doc in docs if doc not in held], "val": [doc[1] for doc in held]}, record


def train_tokenizer(texts: list[str]):
    """Byte-level BPE over the texts, with the added tokens at the highest ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB - len(ADDED), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    for text in ADDED:
        add = tok.add_special_tokens if text in SPECIAL else tok.add_tokens
        add([AddedToken(text, special=text in SPECIAL, normalized=False)])
    assert [tok.token_to_id(text) for text in ADDED] == list(range(VOCAB - len(ADDED), VOCAB))
    return tok


def main() -> None:
    """Parse the arguments, build, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent.parent / ".tiny",
        help="output folder (default: .tiny in the repository)",
    )
    parser.add_argument("--debs", type=Path, help="folder of .deb files, reused and added to (default: OUT/debs)")
    args, begin = parser.parse_args(), time.monotonic()
    for folder in (args.out, debs := (args.debs or args.out / "debs").resolve()):
        folder.mkdir(parents=True, exist_ok=True)
    seen, sources, texts = set(), [], {"train": [], "val": []}
    for line in SOURCES.strip().splitlines():
        try:
            parts, record = gather(line, debs, seen)
        except (OSError, ValueError, LookupError, zlib.error, subprocess.SubprocessError) as error:
            sys.exit(f"tiny_corpus: {line.split()[0]}: {error} (this needs Debian 12, with apt-get and dpkg-deb)")
        for part, docs in parts.items():
            texts[part] += [(record, text) for text in docs]
        sources.append(record)
        print(f"[{time.monotonic() - begin:3.0f} s] {line.split()[0]}: {record['bytes']:,} bytes", flush=True)
    tok = train_tokenizer([text for _, text in texts["train"]])
    tok.save(str(args.out / "tokenizer.json"))
    totals = {"bytes": sum(record["bytes"] for record in sources)}
    for part, docs in texts.items():
        print(f"[{time.monotonic() - begin:3.0f} s] tokenizing {part}: {len(docs)} documents", flush=True)
        codes, lengths = [], [0]
        for record, text in docs:
            codes.append(np.array(tok.encode(f"]~!b[{text}[e~[").ids, np.uint16))
            lengths.append(len(codes[-1]))
            record["tokens"] += lengths[-1]
            assert max(codes[-1][1:-1]) < VOCAB - len(ADDED), f"an added token in {record['packages']}"
        np.save(args.out / f"{part}.npy", np.concatenate(codes))
        np.save(args.out / f"{part}_offsets.npy", np.cumsum(lengths, dtype=np.int64))
        totals |= {
            f"{part}_documents": len(docs),
            f"{part}_tokens": sum(lengths),
            f"{part}_characters": sum(len(text) for _, text in docs),
        }
    (args.out / "sources.json").write_text(json.dumps({"sources": sources, "totals": totals}, indent=1) + "\n")
    print(f"[{time.monotonic() - begin:3.0f} s] done: {totals}")


if __name__ == "__main__":
    main()
