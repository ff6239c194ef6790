"""Text to tokens: no word is endless, and no text is a special token."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lkda.data.text import pieces
from lkda.data.text.datamodule import TextDataModule
from lkda.data.text.files import sotu_sources
from lkda.data.text.tokenizer import (
    END_OF_TEXT,
    LONGEST_WORD,
    document_start,
    encode_text,
    encode_texts,
    load_tokenizer,
    train_tokenizer,
)

WORDS = "the people of these states have in their union a more perfect peace than others"


def prose(words: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), words))


def gpt2(texts: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of GPT-2's words, as older checkpoints hold one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def byte_level(*special: str) -> Tokenizer:
    """Bytes alone, with these special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def sentencepiece() -> Tokenizer:
    """Unigram: its model finds "</s>" in a text by itself, as the likeliest piece."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in sorted(set(WORDS + "▁<>/")))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def merged() -> Tokenizer:
    """Its merges spell "<s>", too."""
    vocabulary = {"a": 0, "<": 1, ">": 2, "s": 3, "<s": 4, "<s>": 5}
    made = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    made.add_special_tokens(["<s>"])
    return made


def whole_words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "[BOS]": 1, "a": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[UNK]", "[BOS]"])
    return made


RUNS = {
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "dna": "ACGT",
    "base64": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789+/",
    "digits": "0123456789",
    "signs": "!\"#$%&()*+,-./:;<=>?@[]^_`{|}~'",
    "blanks": " ",
    "newlines": "\n",
    "white space": " \t\n\r\u3000",
    "cjk": "".join(map(chr, range(0x4E00, 0x4F00))),
    "emoji": "".join(map(chr, range(0x1F600, 0x1F640))),
    "one letter": "a",
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_without_an_end_is_cut_into_words_of_a_bounded_length(kind):
    text = "begin " + "".join(np.random.default_rng(0).choice(list(RUNS[kind]), 10_000)) + " end"
    tokenizer = train_tokenizer([text], 500)
    assert tokenizer.decode(encode_text(tokenizer, text)) == text
    ends = [end - begin for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert max(ends) <= LONGEST_WORD + 1  # the blank before a word is a part of it


# Of several bytes a character, of one, and of one character alone.
SOME = ("cjk", "letters", "one letter")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SOME else pytest.mark.long) for kind in RUNS]
)
def test_a_word_of_400_000_characters_is_prepared_in_seconds(kind, tmp_path):
    text = "begin " + "".join(np.random.default_rng(0).choice(list(RUNS[kind]), 400_000)) + " end"
    begin = time.process_time()
    data = data_of(tmp_path, [text], vocab_size=4096)
    assert time.process_time() - begin < 60
    assert data.tokenizer.decode(data._train.token_ids[1:].tolist()) == text


def test_ordinary_text_has_the_tokens_it_always_had():
    texts = [path.read_text(encoding="utf-8") for path in sotu_sources().train[-6:]]
    texts.append(
        "It's 1,790 words:\n\n\t" + "-" * LONGEST_WORD + "\n" + " " * LONGEST_WORD + "x  naïve 漢字。 🙂🙂\r\n "
    )
    before, now = gpt2(texts, 1000), train_tokenizer(texts, 1000)
    assert json.loads(before.to_str())["model"] == json.loads(now.to_str())["model"]
    assert [e.ids for e in before.encode_batch(texts)] == [e.ids for e in encode_texts(now, texts)]


def test_a_long_text_without_blanks_is_cut_where_words_end(monkeypatch, tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdé漢🙂0+ \n"), 20_000)).replace(" ", "")
    tokenizer = train_tokenizer([text], 400)
    monkeypatch.setattr(pieces, "_PIECE", 1000)
    found = list(pieces.pieces_of(text, tokenizer.pre_tokenizer))
    assert "".join(found) == text
    assert max(len(piece) for piece in found) <= 2000
    assert [token for piece in found for token in encode_text(tokenizer, piece)] == encode_text(tokenizer, text)
    # One that puts a space before every text would make other tokens of the pieces: it gets the whole.
    assert list(pieces.pieces_of(text, pre_tokenizers.ByteLevel(add_prefix_space=True))) == [text]
    assert list(pieces.pieces_of(text, None)) == [text]


TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "lkda's": (lambda: train_tokenizer([WORDS], 300), END_OF_TEXT),
    "an older one": (lambda: gpt2([WORDS], 300), END_OF_TEXT),
    "bytes": (lambda: byte_level("<|begin_of_text|>", "<|im_end|>"), "<|im_end|>"),
    "sentencepiece": (sentencepiece, "</s>"),
    "merged": (merged, "<s>"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_that_spells_a_special_token_is_text(kind):
    make, spelled = TOKENIZERS[kind]
    tokenizer = make()
    number = tokenizer.token_to_id(spelled)
    text = f"a{spelled}a"
    for tokens in (encode_text(tokenizer, text), *(e.ids for e in encode_texts(tokenizer, [text, "a", text]))):
        assert number not in tokens
    decoded = tokenizer.decode(encode_text(tokenizer, text), skip_special_tokens=False)
    assert decoded.replace(" ", "") == text
    # Who asks the tokenizer itself has the token still, also after it was written and read.
    again = Tokenizer.from_str(tokenizer.to_str())
    assert number in tokenizer.encode(text).ids
    assert number in again.encode(text).ids


def test_a_word_that_no_other_tokens_spell_is_unknown():
    assert encode_text(whole_words(), "a [BOS] a") == [2, 0, 2]


@pytest.mark.parametrize(
    ("special", "begins"),
    [
        ([END_OF_TEXT], END_OF_TEXT),
        (["<s>", END_OF_TEXT], END_OF_TEXT),
        (["<unk>", "<s>", "</s>"], "<s>"),
        (["<|end_of_text|>", "<|begin_of_text|>"], "<|begin_of_text|>"),
        (["<pad>", "<eos>", "<bos>"], "<bos>"),
        (["[EOS]", "[BOS]", "<|im_end|>"], "[BOS]"),
        (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], "<｜begin▁of▁sentence｜>"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS]"),
        (["<pad>", "</s>", "<unk>"], "</s>"),
        (["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
        (["<pad>", "<unk>", "<|reserved_1|>"], None),
        ([], None),
    ],
)
def test_documents_begin_with_the_tokenizers_own_token(special, begins):
    tokenizer = byte_level(*special)
    assert document_start(tokenizer) == (None if begins is None else tokenizer.token_to_id(begins))


def test_an_ordinary_token_of_that_name_begins_nothing():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<s>", special=False)])
    assert document_start(tokenizer) is None


def data_of(
    folder: Path, documents: list[str], *, validation: list[str] | None = None, **options: object
) -> TextDataModule:
    for name, texts in (("train", documents), ("val", validation or [prose(60)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {"vocab_size": 300, "context": 32, "batch_size": 2, "cache_dir": str(folder / "cache"), **options}
    paths = {"paths": [str(folder / "train.jsonl")], "val_paths": [str(folder / "val.jsonl")], "test_fraction": 0.0}
    data = TextDataModule(source="files", **paths, **given)  # type: ignore[arg-type]
    data.prepare()
    return data


def test_a_document_that_spells_the_token_between_documents_is_one_document(tmp_path):
    documents = [f"{prose(30, n)} {END_OF_TEXT} {prose(30, n + 50)}{END_OF_TEXT}" for n in range(9)]
    data = data_of(tmp_path, documents)
    assert (data._train.token_ids == document_start(data.tokenizer)).sum() == len(data._train.starts) == 9
    texts = np.split(data._train.token_ids, data._train.starts[1:])
    assert [data.tokenizer.decode(text.tolist()) for text in texts] == documents


@pytest.mark.parametrize("special", [(), ("<s>", "</s>"), ("<pad>", "[EOS]")], ids=str)
def test_documents_of_a_foreign_tokenizer_never_see_each_other(special, tmp_path):
    tokenizer = byte_level(*special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    documents = [prose(12, n) for n in range(9)]
    data = data_of(tmp_path, documents, tokenizer_path=str(tmp_path / "tokenizer.json"))
    start = document_start(load_tokenizer(tmp_path / "tokenizer.json"))
    assert (start is None) == (not special)
    first = [] if start is None else [start]
    streams = [[*first, *encode_text(tokenizer, document)] for document in documents]
    places = np.cumsum([0, *(len(tokens) for tokens in streams[:-1])])
    assert data._train.token_ids.tolist() == [token for tokens in streams for token in tokens]
    assert data._train.starts.tolist() == places.tolist()
    begins = {n for n in places if n < data._train.count * 32} | {32 * n for n in range(data._train.count)}
    found = [data._train.begins(n) + 32 * n for n in range(data._train.count)]
    assert sorted(begins) == np.concatenate(found).tolist()
    assert data.val_batches == len(list(data.val_dataloader()))
