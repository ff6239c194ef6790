"""A session continues, forks, and is saved."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lkda
from tests.generation.test_generate import byte_tokenizer, model_of
from tests.models.helpers import FEW, small

OPTIONS = {"max_new_tokens": 10, "temperature": 0}


@pytest.mark.parametrize("pattern", FEW)
def test_a_session_generates_what_the_whole_text_gives(pattern, tmp_path):
    model, tokenizer = model_of(pattern).double(), byte_tokenizer()
    session = lkda.Session(model, tokenizer)
    session.read("abc")
    session.read("def")
    fork = session.clone()
    first = session.generate(**OPTIONS)
    assert first.tokens == lkda.generate(model, tokenizer, "abcdef", **OPTIONS).tokens[0]
    second = session.generate(**OPTIONS)
    whole = lkda.generate(model, tokenizer, "abcdef", max_new_tokens=20, temperature=0).tokens[0]
    if first.reason == "max_new_tokens":
        assert first.tokens + second.tokens == whole
    assert fork.generate(**OPTIONS) == first
    fork.save(tmp_path / "session")
    loaded = lkda.Session.load(tmp_path / "session", model, tokenizer)
    assert loaded.num_tokens == fork.num_tokens == 7 + len(first.tokens)
    assert loaded.generate(max_new_tokens=10, seed=3) == fork.generate(max_new_tokens=10, seed=3)
    constant = "softmax" not in pattern and "mla" not in pattern
    assert session.constant == constant
    assert ("constant" in repr(session)) == constant
    assert session.state_bytes == model.state_bytes(session._decoder.lengths[0])


@pytest.mark.parametrize("pattern", [["kda"], ["softmax"]], ids=["kda", "softmax"])
def test_after_the_end_of_a_document_it_continues_what_it_has_generated(pattern):
    model, tokenizer = model_of(pattern).double(), byte_tokenizer()
    session = lkda.Session(model, tokenizer)
    session.read("abc")
    tokens, reasons = [0, *tokenizer.encode("abc").ids], []
    for seed in range(40):  # an end after some tokens, and one at once
        generated = session.generate(max_new_tokens=40, temperature=1.5, seed=seed)
        tokens += generated.tokens
        reasons.append((generated.reason, bool(generated.tokens)))
        with torch.inference_mode():
            want = int(model(torch.tensor([tokens]))[0, -1].argmax())
        after = session.clone().generate(max_new_tokens=1, temperature=0)
        assert (after.tokens or (0,)) == (want,)
        if ("end of document", True) in reasons:
            break
    assert ("end of document", True) in reasons


def test_it_is_saved_in_a_new_folder_or_refused_in_one_line(tmp_path):
    session = lkda.Session(model_of(["kda"]), byte_tokenizer())
    session.read("abc")
    session.save(tmp_path / "new" / "folder" / "session")
    assert (tmp_path / "new" / "folder" / "session").is_file()
    with pytest.raises(ValueError, match="is a directory: give the name of a file in it"):
        session.save(tmp_path)
    with pytest.raises(ValueError, match="cannot be written"):
        session.save("/proc/none/session")


@pytest.mark.parametrize("text", [3, "\udcff"])
def test_what_is_not_text_is_not_read(text):
    session = lkda.Session(model_of(["kda"]), byte_tokenizer())
    with pytest.raises(ValueError, match=r"Session.read: (text must be text|the text is not UTF-8)"):
        session.read(text)
    assert session.num_tokens == 0


def test_tokens_that_the_model_lacks_are_not_read():
    session = lkda.Session(small(["kda"], vocab_size=90), byte_tokenizer())
    session.read("0")
    before = session.num_tokens
    with pytest.raises(ValueError, match=r"token ids from \d+ to \d+ and the model knows 0 to 89"):
        session.read("~")
    assert session.num_tokens == before
    session.read("1")
    with pytest.raises(ValueError, match=r"must be a tokenizers.Tokenizer, as lkda.load returns, got str"):
        lkda.Session(model_of(["kda"]), "tokenizer")


def test_a_cache_makes_room(monkeypatch):
    monkeypatch.setattr("lkda.generation.session.SMALLEST_CACHE", 4)
    model, tokenizer = model_of(["softmax"]), byte_tokenizer()
    session = lkda.Session(model, tokenizer)
    for text in ("ab", "cdefg", "h"):
        session.read(text)
    want = lkda.generate(model, tokenizer, "abcdefgh", **OPTIONS).tokens[0]
    assert session.generate(**OPTIONS).tokens == want


def test_another_model_is_refused_by_name(tmp_path):
    tokenizer = byte_tokenizer()
    session = lkda.Session(model_of(["kda"]), tokenizer)
    session.read("abc")
    session.save(tmp_path / "session")
    with pytest.raises(ValueError, match=r"session of another model \(kda, 2 layers.*it is softmax, 2 layers of 32"):
        lkda.Session.load(tmp_path / "session", model_of(["softmax"]), tokenizer)
    other = model_of(["kda"])
    with torch.no_grad():
        other.norm.weight.add_(1)
    with pytest.raises(ValueError, match="its weights are others"):
        lkda.Session.load(tmp_path / "session", other, tokenizer)
    mixer = {"pattern": ["kda"], "num_heads": 2, "kda": {"negative_eigenvalues": True}}
    with pytest.raises(ValueError, match=r"it has another kda.negative_eigenvalues \("):
        lkda.Session.load(tmp_path / "session", small([], vocab_size=257, num_layers=2, mixer=mixer), tokenizer)
    mixer["kda"] = {"negative_eigenvalues": False, "conv_width": 4}
    same = small([], vocab_size=257, num_layers=2, mixer=mixer)
    assert lkda.Session.load(tmp_path / "session", same, tokenizer).num_tokens == session.num_tokens
    (tmp_path / "broken").write_bytes((tmp_path / "session").read_bytes()[:200])
    with pytest.raises(ValueError, match="is not a session, or is incomplete"):
        lkda.Session.load(tmp_path / "broken", other, tokenizer)
    with pytest.raises(ValueError, match="there is no session at"):
        lkda.Session.load(tmp_path / "none", other, tokenizer)
    with pytest.raises(ValueError, match="the session is empty"):
        lkda.Session(other, tokenizer).generate()


@pytest.mark.parametrize("pattern", [["kda"], ["softmax"]], ids=["kda", "softmax"])
def test_a_damaged_file_is_refused_in_one_line(pattern, tmp_path):
    model, tokenizer = model_of(pattern), byte_tokenizer()
    session, path = lkda.Session(model, tokenizer), tmp_path / "session"
    session.read("abc")
    session.generate(max_new_tokens=2, seed=1)
    session.save(path)
    whole = torch.load(path, weights_only=True)
    cut = [[part[..., :1] for part in layer] for layer in whole["state"]]
    values = {
        "model": [None, {}, "x"],
        "num_tokens": [None, "a", [5], 0, -1, 10**12, True, float(whole["num_tokens"])],
        "unread": [None, [300], [0, 0], 5, ["a"], [True]],
        "length": [None, -1, 10**9, "x", 0],
        "logits": [None, 5, torch.zeros(1, 7), torch.zeros(1, 257).bool(), torch.zeros(1, 257).to_sparse()],
        "state": [None, [], whole["state"][:1], cut, [["a"] * len(layer) for layer in whole["state"]]],
    }
    damaged = [whole | {name: value} for name, some in values.items() for value in some]
    damaged.append(whole | {"unread": ()})
    damaged += [{key: value for key, value in whole.items() if key != name} for name in values]
    for content in damaged:
        torch.save(content, path)
        with pytest.raises(ValueError, match="is damaged: it holds a value of a wrong kind") as error:
            lkda.Session.load(path, model, tokenizer)
        assert "\n" not in str(error.value)


def test_a_stream_checks_at_once_and_nothing_comes_between():
    session = lkda.Session(model_of(["kda"]), byte_tokenizer())
    session.read("abc")
    for options in ({"top_p": 0}, {"seed": 1.5}, {"stop": ""}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            session.stream(**options)
    stream = session.stream(max_new_tokens=50, temperature=0)
    next(stream)
    fork = session.clone()
    fork.read("d")
    next(stream)
    session.read("d")
    with pytest.raises(ValueError, match="has read or generated something else since the last piece"):
        next(stream)


@pytest.mark.parametrize("pattern", [["softmax"], ["kda", "mla"]], ids="-".join)
@pytest.mark.parametrize("more", [-(10**6), -1, 1, 10**6])
def test_a_file_with_another_length_of_a_cache_is_refused(pattern, more, tmp_path):
    """A step in C++ would write where the length says, also outside of the cache."""
    model, tokenizer = model_of(pattern), byte_tokenizer()
    session, path = lkda.Session(model, tokenizer), tmp_path / "session"
    session.read("abc")
    session.save(path)
    whole = torch.load(path, weights_only=True)
    state = [[part + more if part.dtype == torch.int64 else part for part in layer] for layer in whole["state"]]
    torch.save(whole | {"state": state}, path)
    with pytest.raises(ValueError, match=r"is damaged: .* a cache of .* tokens does not fit 4 tokens"):
        lkda.Session.load(path, model, tokenizer)


@pytest.mark.parametrize("pattern", [["kda"], ["softmax"]], ids=["kda", "softmax"])
def test_a_stream_goes_on_after_a_call_that_reads_nothing(pattern):
    model, tokenizer = model_of(pattern), byte_tokenizer()
    session = lkda.Session(model, tokenizer)
    session.read("abc")
    fork = session.clone()
    want = fork.generate(max_new_tokens=8, temperature=0).tokens
    stream = session.stream(max_new_tokens=8, temperature=0)
    next(stream)
    session.read("")
    assert session.generate(max_new_tokens=0).tokens == ()
    list(stream)
    assert session.num_tokens == fork.num_tokens
    after = [each.generate(max_new_tokens=8, temperature=0).tokens for each in (session, fork)]
    assert after[0] == after[1] != want
    assert session._decoder.lengths == fork._decoder.lengths


def test_the_file_of_a_constant_state_has_a_constant_size(tmp_path):
    session = lkda.Session(model_of(["kda", "simplified"]), byte_tokenizer())
    sizes = []
    for text in ("abc", "d" * 3000):
        session.read(text)
        session.save(tmp_path / "session")
        sizes.append((tmp_path / "session").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("pattern", [["softmax"], ["kda", "mla"]], ids="-".join)
def test_a_file_that_claims_many_tokens_takes_no_memory(pattern, tmp_path):
    model, tokenizer = model_of(pattern), byte_tokenizer()
    session, path = lkda.Session(model, tokenizer), tmp_path / "session"
    session.read("abc")
    session.save(path)
    whole, many = torch.load(path, weights_only=True), 10**12
    state = [[torch.full_like(p, many) if p.dtype == torch.int64 else p for p in layer] for layer in whole["state"]]
    torch.save(whole | {"num_tokens": many, "length": many, "state": state}, path)
    with pytest.raises(ValueError, match=r"is damaged: .* does not fit 1000000000000 tokens"):
        lkda.Session.load(path, model, tokenizer)


@pytest.mark.slow
def test_another_process_continues_it(tmp_path):
    model, tokenizer = model_of(["kda", "softmax"]), byte_tokenizer()
    lkda.export(model, tokenizer, tmp_path / "exported")
    session = lkda.Session(*lkda.load(tmp_path / "exported"))
    session.read("abc")
    session.generate(max_new_tokens=5, seed=1)
    session.save(tmp_path / "session")
    code = (
        "import lkda, sys\n"
        "session = lkda.Session.load(sys.argv[1], *lkda.load(sys.argv[2]))\n"
        "print(session.generate(max_new_tokens=9, seed=2).tokens)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "session"), str(tmp_path / "exported")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(session.generate(max_new_tokens=9, seed=2).tokens)
