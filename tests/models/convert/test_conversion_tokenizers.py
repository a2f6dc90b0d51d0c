"""Tokenizers on their way: the ids of a text stay what they were, whichever library reads them."""

import base64
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, edit
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.convert.tokenizer_models import from_sentencepiece, from_tokenizer_model
from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.models.tokenizer_file import read_vocabulary, tokenizer_fingerprint, vocabulary_of

PIECES = ["def ", " ", "  ", "    return", "\n", "\t", "\r\n", "x", "12", "é", "中", "👩‍👩‍👧", "▁", "\0", "'s"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(PIECES), max_size=10
).map("".join)


# --- SentencePiece ---


@pytest.fixture(scope="module")
def sentencepiece_pair(sentencepiece_file):
    """The library that the file belongs to, and what is made of the file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file)), from_sentencepiece(
        sentencepiece_file
    )


@settings(deadline=None, max_examples=400)
@given(text=TEXT)
def test_sentencepiece_gives_the_same_ids(sentencepiece_pair, text):
    library, tokenizer = sentencepiece_pair
    ids = library.encode(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer(text).input_ids == [1, *ids], "the beginning goes first"


def test_sentencepiece_vocabulary(sentencepiece_pair):
    library, tokenizer = sentencepiece_pair
    assert len(tokenizer) == library.vocab_size()
    for number in range(library.vocab_size()):
        assert tokenizer.convert_ids_to_tokens(number) == library.id_to_piece(number)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (library.bos_id(), library.eos_id())


def test_sentencepiece_after_saving(sentencepiece_file, make_release, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    folder, _ = make_release()
    import_model(folder, tmp_path / "policy")
    assert (tmp_path / "policy/tokenizer.model").read_bytes() == sentencepiece_file.read_bytes()
    for tokenizer in (load_tokenizer(tmp_path / "policy"), AutoTokenizer.from_pretrained(tmp_path / "policy")):
        for text in ("    return x", "def f(x):\n    return 1", "  a", "naïve 中", " "):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == library.encode(text)
            assert tokenizer.decode(ids) == text
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}, "generate() refuses anything else"


def test_a_sentencepiece_model_of_another_kind(tmp_path, sentencepiece_file):
    """A unigram model is read by other rules: that is found, not passed over."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = ["def f(x):", "    return x + 1", "for item in items:", "    print(item)", "while True:", "    pass"] * 20
    (tmp_path / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    with pytest.raises(UserError, match=r"tokenizer\.model: sentencepiece reads .* as \[.*Models of this kind are not"):
        from_tokenizer_model(tmp_path / "tokenizer.model", 300)


# --- tiktoken ---

WORDS = [b"de", b"def", b" f", b"  ", b"    ", b"re", b"ret", b"\n", b"12", b"\xc3\xa9"]


def write_tiktoken(file) -> dict[bytes, int]:
    singles = [bytes([number]) for number in range(256)]
    tokens = [*singles, *(word for word in WORDS if word not in singles)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return ranks


def byte_pairs(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as tiktoken defines it: the pair of the lowest rank is merged, until none has one."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [ranks.get(parts[i] + parts[i + 1], 10**9) for i in range(len(parts) - 1)]
        if not pairs or min(pairs) == 10**9:
            return [ranks[part] for part in parts]
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@settings(deadline=None, max_examples=100)
@given(piece=st.sampled_from(["def", " f", "ret", "é", "    ", "12", "1", "x", "\n", "redef", "\n\n"]))
def test_tiktoken_gives_the_same_ids(tmp_path_factory, piece):
    """Of pieces that its pattern does not cut."""
    file = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    ranks = write_tiktoken(file)
    tokenizer = from_tokenizer_model(file, 300)
    expected = ranks.get(piece.encode())
    expected = [expected] if expected is not None else byte_pairs(piece.encode(), ranks)
    assert tokenizer(piece, add_special_tokens=False).input_ids == expected
    assert tokenizer.decode(expected) == piece


def test_tiktoken_specials_follow_the_ranks(tmp_path):
    ranks = write_tiktoken(tmp_path / "tokenizer.model")
    tokenizer = from_tokenizer_model(tmp_path / "tokenizer.model", len(ranks) + 256)
    base = len(ranks)
    expected = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
    }
    for token, number in expected.items():
        assert tokenizer.convert_tokens_to_ids(token) == base + number
    assert len(tokenizer) == base + 256
    assert tokenizer("x").input_ids == [base, ord("x")]
    assert tokenizer.eos_token_id == base + 1


def test_a_release_with_tiktoken(make_release, tmp_path):
    folder, _ = make_release()
    ranks = write_tiktoken(folder / "tokenizer.model")
    import_model(folder, tmp_path / "policy")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (len(ranks), len(ranks) + 1)
    assert max(read_vocabulary(tmp_path / "policy/tokenizer.json")) == VOCABULARY - 1


@pytest.mark.parametrize("line", ["QQ= 1", "QQ==", "QQ== x", "QQ== 1 2", "é 3"])
def test_a_damaged_tiktoken_file(tmp_path, line):
    write_tiktoken(tmp_path / "tokenizer.model")
    content = (tmp_path / "tokenizer.model").read_text().splitlines()
    content[7] = line
    (tmp_path / "tokenizer.model").write_text("\n".join(content))
    with pytest.raises(UserError, match=r"tokenizer\.model, line 8: not a token in base64 and its rank"):
        from_tokenizer_model(tmp_path / "tokenizer.model", 300)


@pytest.mark.parametrize("line", ["QQ== 8", "QQ== 900", "QQ== -1", "AAA= 9"])
def test_tiktoken_ranks_that_are_not_each_once(tmp_path, line):
    write_tiktoken(tmp_path / "tokenizer.model")
    content = (tmp_path / "tokenizer.model").read_text().splitlines()
    content[7] = line
    (tmp_path / "tokenizer.model").write_text("\n".join(content))
    with pytest.raises(UserError, match=r"tokenizer\.model: its ranks are not 0, 1, 2, …, each once"):
        from_tokenizer_model(tmp_path / "tokenizer.model", 300)


# --- tokenizer.json and the classes of transformers ---


@pytest.fixture
def llama_2(make_llama, sentencepiece_file, tmp_path):
    """A folder as on the hub: tokenizer.json with Llama 2's normalizer, tokenizer_config.json with Llama's class."""
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    pieces = [library.id_to_piece(number) for number in range(library.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[259:]:
        merges += [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= ids.keys()
        ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    folder = make_llama(tokenizer=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False, "special": True},
        "clean_up_tokenization_spaces": False,
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False, "special": True},
        "legacy": False,
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": False, "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, library


@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast"]
)
def test_a_llama_2_tokenizer_keeps_its_spaces(llama_2, tmp_path, kind):
    """transformers 5 reads `    return` without one of its spaces if it is told the class of the hub."""
    folder, library = llama_2
    edit(folder / "tokenizer_config.json", tokenizer_class=kind)
    import_model(folder, tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "export")
    for place in (tmp_path / "policy", tmp_path / "export"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        for text in ("    return x", "  y = [1]\n    z", "a", " ", "\tx"):
            ids = library.encode(text)
            assert tokenizer(text, add_special_tokens=False).input_ids == ids, (place.name, text)
            assert tokenizer.decode(ids) == text
        config = json.loads((place / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast", "known to every version of transformers"
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_folder_with_tokenizer_model_alone(llama_2, sentencepiece_file, tmp_path):
    folder, library = llama_2
    (folder / "tokenizer.json").unlink()
    shutil.copy(sentencepiece_file, folder)
    import_model(folder, tmp_path / "policy")
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert tokenizer("    return x", add_special_tokens=False).input_ids == library.encode("    return x")


def test_a_folder_without_tokenizer_config(make_llama, tmp_path):
    """Its special tokens are those that config.json names."""
    folder = make_llama()
    (folder / "tokenizer_config.json").unlink()
    import_model(folder, tmp_path / "policy")
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_the_tokenizer_is_copied_as_it_is(make_llama, tmp_path):
    folder = make_llama()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    import_model(folder, tmp_path / "policy")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "policy" / name).read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_of_gpt_2s_files(make_llama, tokenizer_folder, tmp_path):
    """vocab.json and merges.txt, of which tokenizer.json is made."""
    folder = make_llama(tokenizer=False)
    vocabulary = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    import_model(folder, tmp_path / "policy")
    expected = AutoTokenizer.from_pretrained(tokenizer_folder)("def f", add_special_tokens=False).input_ids
    assert load_tokenizer(tmp_path / "policy")("def f", add_special_tokens=False).input_ids == expected


@pytest.mark.parametrize("by", ["folder", "file"])
def test_a_tokenizer_from_elsewhere(make_llama, tokenizer_folder, tmp_path, by):
    folder = make_llama(tokenizer=False)
    place = tokenizer_folder if by == "folder" else tokenizer_folder / "tokenizer.json"
    import_model(folder, tmp_path / "policy", tokenizer=place)
    assert (tmp_path / "policy/tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()


def test_a_tokenizer_model_from_elsewhere(make_release, sentencepiece_file, tmp_path):
    folder, _ = make_release()
    (folder / "tokenizer.model").unlink()
    import_model(folder, tmp_path / "policy", tokenizer=sentencepiece_file)
    assert (tmp_path / "policy/tokenizer.model").read_bytes() == sentencepiece_file.read_bytes()


def test_an_elsewhere_without_tokenizer(make_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--tokenizer .*empty: there is no tokenizer\.json and no tokenizer\.model"):
        import_model(make_llama(), tmp_path / "policy", tokenizer=tmp_path / "empty")


# --- another vocabulary ---


def test_tokens_that_the_model_does_not_embed(make_llama, tmp_path):
    folder = make_llama(vocab_size=258)
    message = (
        r"the tokenizer in .*source has a token of id 258 \('.*'\), but the model embeds 258 tokens: .*--tokenizer"
    )
    for command in (import_model, export_model):
        with pytest.raises(UserError, match=message):
            command(folder, tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    import_model(make_llama("fits", vocab_size=259), tmp_path / "result")


def test_a_far_smaller_vocabulary_is_doubtful(make_llama, tmp_path):
    done = import_model(make_llama(vocab_size=2000, hidden_size=16), tmp_path / "policy")
    assert [warning.split(",")[0] for warning in done.warnings] == ["the model embeds 2000 tokens"]
    done = import_model(make_llama("padded", vocab_size=1200, hidden_size=16), tmp_path / "other")
    assert done.warnings == [], "a padded vocabulary"


@pytest.mark.parametrize(("ends", "doubtful"), [(2, False), ([0, 2], False), (1, True), ([0, 1], True), (None, False)])
def test_another_end_of_texts_is_doubtful(make_llama, tmp_path, ends, doubtful):
    folder = make_llama()
    edit(folder / "config.json", eos_token_id=ends)
    warnings = import_model(folder, tmp_path / "policy").warnings
    assert any("ends texts with id 2 (</s>), the model's config with" in warning for warning in warnings) == doubtful


def test_a_tokenizer_without_an_end(make_llama, tmp_path):
    folder = make_llama()
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "config.json", eos_token_id=999)
    with pytest.raises(UserError, match=r"the tokenizer in .*source has no end-of-text token"):
        import_model(folder, tmp_path / "policy")


def test_a_tokenizer_that_asks_for_code(make_llama, tmp_path):
    folder = make_llama()
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    import_model(folder, tmp_path / "policy")
    assert "auto_map" not in json.loads((tmp_path / "policy/tokenizer_config.json").read_text())
    assert not (tmp_path / "policy/evil.py").exists()


def test_a_class_that_reads_otherwise_is_found(llama_2, tmp_path, monkeypatch):
    """What is tried on texts is what transformers will load."""
    folder, _ = llama_2
    monkeypatch.setattr("wmtp_ds.models.convert.tokenizer.PLAIN_CLASS", "LlamaTokenizer")
    with pytest.raises(UserError, match=r"source: transformers reads .* in another way than its tokenizer\.json says"):
        import_model(folder, tmp_path / "policy")


def test_digits_stay_apart(make_llama, tmp_path):
    """As in SmolLM2's folder: a rule of its own in tokenizer.json, and a class that would leave it out."""
    folder = make_llama()
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"] | {"Ġ1": 259, "12": 260}
    content["model"] |= {"vocab": vocabulary, "merges": [["Ġ", "1"], ["1", "2"]]}
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = plain.encode("x = 12 + 1").ids
    assert not {259, 260} & set(expected)
    assert AutoTokenizer.from_pretrained(folder)("x = 12 + 1").input_ids != expected, "what this is for"
    assert load_tokenizer(folder)("x = 12 + 1").input_ids == expected, "a folder that was never imported"
    import_model(folder, tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")("x = 12 + 1").input_ids == expected


def test_special_tokens_that_a_class_knew(make_llama, tmp_path):
    """They are said once the class is another; what tokenizer_config.json or the map of special tokens says wins."""
    folder = make_llama()
    edit(folder / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<s>"}))
    edit(folder / "tokenizer_config.json", bos_token="</s>")
    import_model(folder, tmp_path / "policy")
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("</s>", "</s>")


# --- the fingerprint of a vocabulary ---


def test_the_fingerprint_is_of_what_each_id_means(tokenizer_folder, tmp_path):
    tokens = read_vocabulary(tokenizer_folder / "tokenizer.json")
    assert len(tokens) == 259
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    assert all(loaded.convert_ids_to_tokens(number) == token for number, token in tokens.items())
    fingerprint = tokenizer_fingerprint(tokens)
    assert len(fingerprint) == 64
    assert tokenizer_fingerprint(dict(reversed(tokens.items()))) == fingerprint
    loaded.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(read_vocabulary(tmp_path / "tokenizer.json")) == fingerprint
    assert tokenizer_fingerprint(tokens | {5: "other"}) != fingerprint
    assert tokenizer_fingerprint({number: token for number, token in tokens.items() if number != 5}) != fingerprint
    exchanged = tokens | {5: tokens[6], 6: tokens[5]}
    assert tokenizer_fingerprint(exchanged) != fingerprint


def test_vocabularies_of_every_kind():
    assert vocabulary_of({"model": {"vocab": {"a": 0, "b": 1}}}) == {0: "a", 1: "b"}
    unigram = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 7, "content": "<x>"}]}
    assert vocabulary_of(unigram) == {0: "a", 1: "b", 7: "<x>"}
    for damaged in ({}, [], None, 3, {"model": None}, {"model": {"vocab": 3}}, {"model": {"vocab": {"a": "x"}}}):
        assert vocabulary_of(damaged) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"\xff", "cannot be read"), (b"[", "cannot be read"), (b"{}", "no vocab")],
)
def test_a_vocabulary_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.json {message}|holds {message}"):
        read_vocabulary(tmp_path / "tokenizer.json")


def test_dtype_does_not_matter_to_a_tokenizer(make_llama, tmp_path):
    import_model(make_llama(), tmp_path / "a", dtype=torch.bfloat16)
    assert load_tokenizer(tmp_path / "a").eos_token_id == 2
