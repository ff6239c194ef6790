"""How much longer a tokenizer can make a text: a file made by a stranger could make it fill the memory."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

from tokenizers import Tokenizer, normalizers

# Known tokenizers need at most 968, which is ALBERT's: NFKD (11), Lowercase (2), Precompiled (11) and Metaspace (4),
# each at its worst character.
LARGEST_GROWTH = 1000
# The most bytes of UTF-8 that a step of the library makes of one byte. NFKD makes 33 bytes of the 3 of U+FDFA. A Bert
# normalizer puts two spaces around a Chinese character, and decomposes others.
_FIXED = {
    ("normalizer", "NFD"): 3,
    ("normalizer", "NFC"): 3,
    ("normalizer", "NFKD"): 11,
    ("normalizer", "NFKC"): 11,
    ("normalizer", "Lowercase"): 2,
    ("normalizer", "BertNormalizer"): 9,
    ("normalizer", "ByteLevel"): 2,
    ("decoder", "ByteLevel"): 3,  # a byte that is no character becomes U+FFFD
    ("decoder", "ByteFallback"): 1,
    ("decoder", "BPEDecoder"): 2,
    ("decoder", "WordPiece"): 2,
    ("decoder", "CTC"): 2,
}
# Where one of these occurs, a regular expression may match between two characters. Groups that begin with "(?" may
# look ahead, and alternatives may be empty.
_MAY_BE_EMPTY = re.compile(r"[*?^$]|\\[bBAzZGKyY]|\{(?!0*[1-9])|^$|\|\||^\||\|$|\(\||\|\)|\(\)")
_ESCAPE_OR_CLASS = re.compile(r"\\[bBAzZGKyY]|(\\.|\[(?:\\.|[^\]\\])*\])", re.DOTALL)


class _Growth(NamedTuple):
    """Of n bytes of text a step makes at most `factor` * n + `added` bytes."""

    factor: float = 1.0
    added: float = 0.0

    def then(self, after: _Growth) -> _Growth:
        return _Growth(self.factor * after.factor, self.added * after.factor + after.added)

    @property
    def most(self) -> float:
        """How many times longer a text of one byte can become. A longer text grows less."""
        return self.factor + self.added


def growths(tokenizer: Tokenizer) -> dict[str, float]:
    """How many times longer a text can become in its UTF-8 bytes, in "encoding" and in "decoding".

    They are upper bounds: every step meets its worst character.
    """
    encoding = _Growth()
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        encoding = encoding.then(_of_part(tokenizer, name))
    return {"encoding": encoding.most, "decoding": _of_part(tokenizer, "decoder").most}


def _of_part(tokenizer: Tokenizer, name: str) -> _Growth:
    part: Any = getattr(tokenizer, name)
    # The state of a part is its JSON in the form of today, whatever form the file has.
    return _Growth() if part is None else _of_step(name, json.loads(part.__getstate__()))


def _of_step(part: str, step: Mapping[str, Any]) -> _Growth:
    match step:
        case {"normalizers": steps} | {"pretokenizers": steps} | {"processors": steps} | {"decoders": steps}:
            return reduce(_Growth.then, (_of_step(part, inner) for inner in steps), _Growth())
        case {"pattern": pattern, "content": content}:
            return _of_replace(pattern, len(content.encode()))
        case {"prepend": text}:
            return _Growth(added=len(text.encode()))
        case {"precompiled_charsmap": charsmap}:
            return _Growth(_of_charsmap(base64.b64decode(charsmap or "")))
        case {"type": "Metaspace", "replacement": sign} if part == "pre_tokenizer":
            # A word of one byte gets a sign in front.
            return _Growth(len(sign.encode()) + (step.get("prepend_scheme") != "never"))
        case {"type": "ByteLevel"} if part == "pre_tokenizer":
            return _Growth(4.0 if step.get("add_prefix_space") else 2.0)
        case {"type": "TemplateProcessing", "single": pieces}:
            return _Growth(max(1, sum("Sequence" in piece for piece in pieces)))
    return _Growth(_FIXED.get((part, str(step.get("type"))), 1))


def _of_replace(pattern: Mapping[str, str], length: int) -> _Growth:
    """Of a step that writes `length` bytes in place of each match."""
    literal = pattern.get("String")
    if literal:
        return _Growth(max(1.0, length / len(literal.encode())))
    bare = _ESCAPE_OR_CLASS.sub(lambda found: "x" if found[1] else found[0], pattern.get("Regex", ""))
    if _MAY_BE_EMPTY.search(bare):  # it matches before each character and at the end
        return _Growth(1 + length, length)
    return _Growth(max(1, length))


def _of_charsmap(charsmap: bytes) -> float:
    """Of a table of SentencePiece, which holds the size of its trie, the trie, and texts that end in a zero byte.

    Characters of one and two bytes are tried. A text for longer ones replaces at least three bytes.
    """
    trie = int.from_bytes(charsmap[:4], "little")
    longest = max(map(len, charsmap[4 + trie :].split(b"\0")))
    step = normalizers.Precompiled(charsmap)
    short = [*map(chr, range(0x800)), "\r\n"]
    tried = max(len(step.normalize_str(text).encode()) / len(text.encode()) for text in short)
    return max(1.0, tried, longest / 3)
