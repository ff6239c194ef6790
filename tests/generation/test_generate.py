"""Texts from prompts: independent of the batch, ended by stop strings, in pieces."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import lkda
from lkda.generation.text import GrowingText
from lkda.models.decoder import Decoder, Sampling
from lkda.models.generate import BatchGenerator, Request
from lkda.models.lm import LanguageModel
from lkda.ops.rows.cpu import LIBRARY
from lkda.special_tokens import END_OF_TEXT
from tests.models.helpers import FEW, small

PROMPTS = ["ab", "c", "abcdefgh", "ba ab", ""]


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, and token 0 begins a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({END_OF_TEXT: 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def model_of(pattern, **changes):
    return small(pattern, vocab_size=257, **changes)


@pytest.mark.parametrize("pattern", FEW)
def test_a_text_is_the_same_in_any_batch(pattern):
    model, tokenizer = model_of(pattern), byte_tokenizer()
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "num_samples": 2, "seed": 5}
    together = lkda.generate(model, tokenizer, PROMPTS, **options)
    assert [(x.prompt_index, x.sample_index) for x in together] == [(i, j) for i in range(5) for j in range(2)]
    for i in (0, 4):
        # The number of the prompt is part of the draws, so the same prompt must stand at the same place.
        alone = lkda.generate(model, tokenizer, PROMPTS[: i + 1], **options)
        assert alone.tokens[-2:] == together.tokens[2 * i : 2 * i + 2]
    assert together.tokens[0] != together.tokens[1]
    assert len(set(lkda.generate(model, tokenizer, "ab", **(options | {"temperature": 0})).texts)) == 1


@pytest.mark.parametrize("pattern", FEW)
def test_a_prompt_is_read_once_for_all_its_samples(pattern, monkeypatch):
    model, tokenizer = model_of(pattern), byte_tokenizer()
    options = {"max_new_tokens": 5, "num_samples": 3}
    want = lkda.generate(model, tokenizer, ["ab", "ab", "c"], **options)
    read, prefill = [], LanguageModel.prefill

    def reading(self, tokens, state):
        read.append(tokens.tolist())
        return prefill(self, tokens, state)

    monkeypatch.setattr(LanguageModel, "prefill", reading)
    found = lkda.generate(model, tokenizer, ["ab", "ab", "c"], **options)
    assert found.tokens == want.tokens
    assert len(set(found.tokens)) == 9
    assert len(read) == 2
    monkeypatch.setattr(Decoder, "_read", lambda self, prompts: one_by_one(self, prompts, prefill))
    assert lkda.generate(model, tokenizer, ["ab", "ab", "c"], **options).tokens == want.tokens


def one_by_one(decoder, prompts, prefill):
    """The state after one prompt, which is read again for each sample."""
    (prompt,) = prompts
    state = decoder.model.init_state(1, max_tokens=len(prompt))
    return prefill(decoder.model, torch.tensor([prompt]), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", FEW)
def test_rows_of_a_batch_decode_what_they_decode_alone(pattern, dtype):
    """The batched step, with places that are taken again. In C++ a row has the same bits in any batch; in PyTorch only
    float64 is tested, where rounding flips no draw."""
    if dtype == torch.float32 and LIBRARY.reason_cannot_run() is not None:
        pytest.skip("no C++ compiler")
    model = model_of(pattern).to(dtype)

    def generated(batch_size):
        prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [13]]
        requests = [Request(prompt, i) for i, prompt in enumerate(prompts)]
        found = {i: [] for i in range(5)}
        batch = BatchGenerator(
            model, requests, max_new_tokens=9, sampling=Sampling(top_p=0.9), end_tokens=range(40), batch_size=batch_size
        )
        for request, token in batch:
            if token is not None:
                found[request.prompt_index].append(token)
        assert all(request.reason is not None for request in requests)
        return found

    alone = generated(1)
    assert len({len(tokens) for tokens in alone.values()}) > 1
    assert generated(3) == alone
    assert generated(5) == alone


def test_a_stop_string_ends_the_text_across_tokens():
    model, tokenizer = model_of(["kda"]), byte_tokenizer()
    whole = lkda.generate(model, tokenizer, "ab", max_new_tokens=40, seed=1, ignore_eos=True)[0]
    assert whole.reason == "max_new_tokens"
    assert len(whole.tokens) == 40
    stop = whole.text[10:13]
    cut = lkda.generate(model, tokenizer, "ab", max_new_tokens=40, seed=1, stop=["never", stop], ignore_eos=True)[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    pieces = list(lkda.stream(model, tokenizer, "ab", max_new_tokens=40, seed=1, stop=stop, ignore_eos=True))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert pieces[-1].result == cut
    assert len(pieces) > 5


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = byte_tokenizer()
    text, pieces = GrowingText(tokenizer, ["xyz"]), []
    for token in tokenizer.encode("axyaxyxy").ids:
        pieces.append(text.add(token))
    assert pieces == ["a", "", "", "xya", "", "", "xy", ""]
    assert text.finish() == "xy"
    assert text.text == "axyaxyxy"
    cut = GrowingText(tokenizer, ["é"])
    assert [cut.add(token) for token in tokenizer.encode("aé").ids] == ["a", "", ""]
    assert cut.stopped
    assert cut.finish() == ""
    assert cut.text == "a"
    broken = GrowingText(tokenizer)
    assert [broken.add(tokenizer.encode("é").ids[0]), broken.finish(), broken.text] == ["", "\ufffd", "\ufffd"]


def test_the_space_before_the_first_word_is_kept_after_a_prompt():
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "<unk>": 1} | {x: i + 2 for i, x in enumerate("▁abc")}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    tokens = tokenizer.encode("bc a", add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == "bc a"
    for continues, want in ((False, "bc a"), (True, " bc a")):
        text = GrowingText(tokenizer, continues=continues)
        pieces = [text.add(token) for token in tokens]
        assert "".join(pieces) + text.finish() == text.text == want
    model = small(["kda"], vocab_size=len(tokenizer.get_vocab()))
    options = {"max_new_tokens": 9, "seed": 4, "ignore_eos": True}
    (found,) = lkda.generate(model, tokenizer, "ab", **options)
    assert tokenizer.decode([*tokenizer.encode("ab", add_special_tokens=False).ids, *found.tokens]) == "ab" + found.text
    session = lkda.Session(model, tokenizer)
    session.read("ab")
    parts = [session.generate(max_new_tokens=count, seed=4) for count in (4, 5)]
    tokens = [*tokenizer.encode("ab", add_special_tokens=False).ids, *parts[0].tokens, *parts[1].tokens]
    assert tokenizer.decode(tokens) == "ab" + parts[0].text + parts[1].text


@pytest.mark.parametrize(
    ("tokens", "want"), [(["abc"], "x"), (["a", "b", "c"], "x"), (["ab", "c"], "x"), (["a", "bc"], "x")]
)
def test_stop_strings_inside_one_another_do_not_depend_on_the_borders_of_tokens(tokens, want):
    """Of "abc" and "b" the second is complete first, also where one token completes both."""
    words = {word: i for i, word in enumerate(["x", "abc", "a", "b", "c", "ab", "bc"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="x"))
    tokenizer.decoder = decoders.Fuse()
    for stop, kept in ((["abc", "b"], "xa"), (["b", "abc"], "xa"), (["bc", "abc"], want), (["abc", "abcd"], want)):
        text = GrowingText(tokenizer, stop)
        pieces = [text.add(words[word]) for word in ["x", *tokens] if not text.stopped]
        assert (text.text, "".join(pieces), text.stopped) == (kept, kept, True)


def test_bytes_that_are_no_character_do_not_end_the_text():
    """A decoder with bytes as a fallback changes the characters before such bytes."""
    words = ["<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab"]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for given, want in (
        (["<0x24>", "<0xA1>", "a"], "$\ufffda"),
        (["<0x24>", "<0x25>", "<0xA1>", "▁", "b"], "$%\ufffd b"),
        (["<0xC3>", "<0xA9>", "<0xE0>", "<0x60>", "a", "<0xC3>", "<0xA9>"], "é\ufffd\ufffd\ufffdaé"),
        (["<0x0A>", "<0xE6>", "<0x97>", "<0xA5>", "b"], "\n日b"),
    ):
        text = GrowingText(tokenizer)
        pieces = [text.add(numbers[word]) for word in given]
        assert "".join(pieces) + text.finish() == text.text == want
    generator = torch.Generator().manual_seed(0)
    for tokens in torch.randint(2, len(words), (200, 12), generator=generator).tolist():
        text = GrowingText(tokenizer, continues=True)
        pieces = [text.add(token) for token in tokens]
        assert "".join(pieces) + text.finish() == text.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: "exported/one", "model must be a model of lkda, as lkda.load returns, got str"),
        (lambda: torch.nn.Linear(3, 3), "model must be a model of lkda, as lkda.load returns, got Linear"),
        (lambda: model_of(["kda"]).to("meta"), "the model has no weights"),
    ],
    ids=["str", "Linear", "meta"],
)
def test_another_object_in_place_of_the_model_is_an_error(model, message):
    with pytest.raises(ValueError, match=message):
        lkda.generate(model(), byte_tokenizer(), "a")
    with pytest.raises(ValueError, match=message):
        lkda.Session(model(), byte_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": 3}, "prompts must be a text or a list of texts, got 3"),
        ({"num_samples": 0}, "num_samples must be a whole number of 1 or more, got 0"),
        ({"num_samples": 10**9}, "num_samples must be at most 1000000, got 1000000000"),
        (
            {"num_samples": 10**6, "prompts": ["a"] * 11},
            "11 prompts with num_samples=1,000,000 are 11,000,000",
        ),
        ({"stop": ""}, "stop must be a text that is not empty"),
        ({"stop": [1]}, "stop must be a text that is not empty, or a list of such texts, got"),
        ({"top_k": 0}, "top_k must be a whole number of 1 or more, got 0"),
        ({"min_p": 1.5}, r"min_p must be from 0 to 1 \(0: all tokens\), got 1.5"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"ignore_eos": "yes"}, "ignore_eos must be true or false"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of 0 or more"),
        ({"temperature": 10**400}, "temperature must be a number of 0 or more"),
        ({"prompts": ["a", "\ud800"]}, r"prompts\[1\] is not UTF-8: .*surrogates not allowed"),
    ],
)
def test_bad_values_are_one_line_at_once(options, message):
    given = {"prompts": "a"} | options
    with pytest.raises(ValueError, match=message):
        lkda.stream(model_of(["kda"]), byte_tokenizer(), given.pop("prompts"), **given)


@pytest.mark.parametrize("pattern", [["softmax"], ["mla"], ["kda", "softmax"]], ids="-".join)
def test_caches_larger_than_the_memory_are_refused_at_once(pattern):
    model, tokenizer = model_of(pattern), byte_tokenizer()
    session = lkda.Session(model, tokenizer)
    session.read("a")
    for tokens in (10**12, 10**30):
        message = rf"a batch of 1 with up to {tokens + 2:,} tokens .* give a smaller max_new_tokens"
        with pytest.raises(ValueError, match=message):
            lkda.stream(model, tokenizer, "a", max_new_tokens=tokens)
        with pytest.raises(ValueError, match=message):
            session.generate(max_new_tokens=tokens)
    constant = lkda.stream(model_of(["kda"]), tokenizer, "a", max_new_tokens=10**30, ignore_eos=True)
    assert next(constant).prompt_index == 0


def test_nothing_to_generate():
    model, tokenizer = model_of(["kda"]), byte_tokenizer()
    assert lkda.generate(model, tokenizer, ["a", "b"], max_new_tokens=0).texts == ["", ""]
    assert len(lkda.generate(model, tokenizer, [])) == 0


def test_logits_that_are_not_numbers_are_an_error():
    model = model_of(["kda"])
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite numbers"):
        lkda.generate(model, byte_tokenizer(), "a", max_new_tokens=2)
