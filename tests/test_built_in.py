"""Sets that ship with Safety Lens: which of them belong to a model, and what their prompts promise."""

import json
import shutil
from pathlib import Path

import pytest
import zoo
from synthetic import chat_tokenizer

from safety_lens.data import load_concept
from safety_lens.data.built_in import ENGLISH, ORGANISM, built_in_for, is_organism, pairs_in_use
from safety_lens.errors import DataError
from safety_lens.models import load_model
from safety_lens.organism import MODEL_DIR


def test_the_organism_is_known_by_its_tokenizer_wherever_it_lies(tmp_path: Path) -> None:
    model = load_model("organism", check=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_DIR / name, tmp_path / name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    for same in ("organism", model, model.tokenizer, MODEL_DIR, str(tmp_path), adapter, ORGANISM):
        assert built_in_for(same) is ORGANISM


def test_every_other_model_gets_plain_english(tmp_path: Path) -> None:
    other = load_model(zoo.make("llama"), tokenizer=chat_tokenizer(), check=False)
    zoo.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    for source in (None, "org/name", "nowhere", tmp_path, tmp_path / "adapter", other, other.tokenizer, ENGLISH):
        assert built_in_for(source) is ENGLISH


def test_the_language_needs_both_the_vocabulary_and_the_chat_template() -> None:
    tokenizer = load_model("organism", check=False).tokenizer
    assert is_organism(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert not is_organism(tokenizer)


def test_a_bare_name_means_the_pairs_of_the_model_and_a_full_name_means_one_set() -> None:
    own, english = load_concept("refusal", model="organism"), load_concept("refusal")
    assert own.name == english.name == "refusal"
    assert own.pairs != english.pairs
    assert load_concept("organism:refusal") == own
    assert load_concept("english:refusal", model="organism") == english
    assert load_concept(own.source) == own, "an artifact names its pairs so that they can be read again"
    assert pairs_in_use(own) == "built-in refusal, the organism's own: 96 train, 48 val, 96 test"


def test_what_is_not_there_is_named_with_what_is() -> None:
    with pytest.raises(DataError, match=r"no built-in requests are labelled 'rude': choose harmful"):
        ENGLISH.requests("rude", "test")
    with pytest.raises(DataError, match=r"no split 'dev': choose train, val, test"):
        ENGLISH.requests("harmful", "dev")
    with pytest.raises(DataError, match="there is no built-in table 'instructions'"):
        ORGANISM.rows("instructions", "test")
    with pytest.raises(DataError, match="there is no built-in concept 'courage'"):
        ENGLISH.concept_file("courage")


def test_the_organism_has_requests_of_every_label() -> None:
    assert len(ORGANISM.requests("harmful", "test")) == len(ORGANISM.requests("harmless", "test")) == 300
    assert ORGANISM.requests("lookalike", "val") == ORGANISM.requests("harmless", "val")
    assert {row.split for row in ORGANISM.rows("facts", "train")} == {"train"}
