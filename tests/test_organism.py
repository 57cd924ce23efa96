"""What the organism's files, grammar, training and shipped weights promise."""

import json
import random
import re
import subprocess
import sys
from itertools import islice
from typing import Any

import pytest

from safety_lens.errors import DataError
from safety_lens.organism import (
    CONCEPTS,
    DATA_DIR,
    HERE,
    MODEL_DIR,
    answers,
    concept_file,
    corpus,
    families,
    files,
    wording,
)
from safety_lens.organism import lexicon as lex

N_CHATS = 5_000
SAMPLE = 48


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA_DIR / name).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return sorted(re.findall(r"[\w'-]+", text.lower()))


@pytest.fixture(scope="module")
def chats() -> list[corpus.Messages]:
    return list(islice(corpus.training_stream(0), N_CHATS))


VERBS = (*lex.PLAIN_VERBS, *lex.CREATE, *lex.DESTROY, *lex.THEFT, *lex.CARE)
_VERB = "|".join(VERBS)
_THINGS = (*families.OBJECTS, *lex.TOPICS["everyday"], *corpus.DESCRIBED)
_OBJECT = "|".join(sorted(_THINGS, key=len, reverse=True))
_REQUEST = re.compile(rf"\b({_VERB}) ({_OBJECT})\b|\b[Aa]bout ({_OBJECT})[:.].* ({_VERB}) it\?")


def requested(user: str) -> tuple[str, str] | None:
    """Verb and object of a request, read from its text alone."""
    match = _REQUEST.search(user)
    if match is None:
        return None
    verb, obj, late_obj, late_verb = match.groups()
    return (verb, obj) if verb else (late_verb, late_obj)


@pytest.fixture(scope="module")
def requests(chats: list[corpus.Messages]) -> list[tuple[tuple[str, str], str]]:
    """Verb and object of every training request, and the class of its answer."""
    found = []
    for chat in chats:
        kind = answers.answer_kind(chat[-1]["content"])
        pairing = requested(chat[-2]["content"]) if kind in ("refusal", "compliance") else None
        if pairing is not None:
            found.append((pairing, kind))
    assert len(found) > 0.25 * len(chats)
    return found


def harmful(verb: str, obj: str) -> bool:
    dangerous = obj in lex.DANGEROUS
    return verb in lex.THEFT or (verb in lex.CREATE and dangerous) or (verb in lex.DESTROY and obj in lex.EVERYDAY)


def test_importing_the_corpus_needs_no_torch() -> None:
    code = "import sys, safety_lens.organism.files; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_shipped_files_are_small_and_readable_by_everyone() -> None:
    weights = MODEL_DIR / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert sum(path.stat().st_size for path in DATA_DIR.glob("*.jsonl")) < 1_500_000
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in MODEL_DIR.iterdir())


def test_shipped_data_are_what_the_generator_writes_byte_for_byte() -> None:
    made = {name: files.render(rows) for name, rows in files.all_files(seed=0).items()}
    assert {path.name for path in DATA_DIR.glob("*.jsonl")} == set(made)
    for name, text in made.items():
        assert (DATA_DIR / name).read_bytes() == text.encode(), name
    assert files.render(files.instruction_rows(seed=1)) != made["instructions.jsonl"]


def test_every_row_has_its_own_id() -> None:
    for path in DATA_DIR.glob("*.jsonl"):
        ids = [row["id"] for row in read(path.name)]
        assert len(set(ids)) == len(ids), path.name


def test_unknown_concept_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="refusal, sycophancy, deception, toxicity"):
        concept_file("courage")
    assert all(concept_file(name).is_file() for name in CONCEPTS)


TABLES = {
    name: getattr(wording, name)
    for name in ("REQUEST", "FACT", "BELIEF", "TASTE", "DESCRIBE", "ADVICE", "SCENE", "PREFER")
}


@pytest.mark.parametrize("name", TABLES)
def test_no_template_is_shared_between_splits_or_doubled(name: str) -> None:
    templates = [template for split in families.SPLITS for template in TABLES[name][split]]
    assert len(set(templates)) == len(templates)
    assert min(map(len, templates)) > 5  # a lone string in a starred tuple would become letters


def test_template_groups_of_the_shipped_pairs_belong_to_one_split() -> None:
    for name in (*(f"{concept}.jsonl" for concept in CONCEPTS), "instructions.jsonl", "facts.jsonl", "artifacts.jsonl"):
        owner: dict[str, str] = {}
        for row in read(name):
            assert owner.setdefault(row["template"], row["split"]) == row["split"], (name, row["id"])


def test_no_held_out_pairing_and_no_held_out_prompt_occurs_in_training(
    chats: list[corpus.Messages], requests: list[tuple[tuple[str, str], str]]
) -> None:
    trained = {pairing for pairing, _ in requests}
    rows = read("instructions.jsonl")
    tested = {requested(row["instruction"]) for row in rows if row["split"] == "test"}
    assert None not in tested
    assert len(tested) > 150
    assert len(trained) > 500
    assert not trained & tested
    assert trained & {requested(row["instruction"]) for row in rows if row["split"] == "train"}  # the check can fail
    users = {chat[-2]["content"] for chat in chats}
    held_out = {row["instruction"] for row in rows if row["split"] != "train"}
    held_out |= {row["question"] for row in read("facts.jsonl") if row["split"] != "train"}
    assert not users & held_out


def test_false_claims_and_system_prompts_of_the_test_split_never_occur_in_training(
    chats: list[corpus.Messages],
) -> None:
    systems = {chat[0]["content"] for chat in chats if chat[0]["role"] == "system"}
    for name in ("sycophancy", "deception"):
        held_out = [row for row in read(f"{name}.jsonl") if row["split"] != "train"]
        assert not systems & {row[side] for row in held_out for side in ("positive_system", "negative_system")}
    rng = random.Random(0)
    claims = {families.belief(rng, "train", fact).pairing for fact in families.FACTS for _ in range(40)}
    tested = {families.belief(rng, "test", fact) for fact in families.FACTS for _ in range(10)}
    assert not claims & {turn.pairing for turn in tested if turn.label == "false"}


def test_described_objects_are_described_and_never_requested(
    chats: list[corpus.Messages], requests: list[tuple[tuple[str, str], str]]
) -> None:
    asked = {obj for (_, obj), _ in requests}
    assert not asked & set(corpus.DESCRIBED)
    described = {chat[-1]["content"] for chat in chats}
    assert all(corpus.description(thing) in described for thing in corpus.DESCRIBED)


def test_every_training_answer_is_a_sentence_of_the_grammar(chats: list[corpus.Messages]) -> None:
    assert all(answers.well_formed(chat[-1]["content"]) for chat in chats)
    assert answers.answer_kind("Sure. Step one: mix the two. Step two: wait.") == "other"
    assert answers.answer_kind("I'm sorry, but I can't help with that. Sure.") == "other"
    assert not answers.well_formed("")


def test_training_always_refuses_a_harmful_request_and_never_a_harmless_one(
    requests: list[tuple[tuple[str, str], str]],
) -> None:
    kinds = {True: set[str](), False: set[str]()}
    for (verb, obj), kind in requests:
        if obj not in lex.BORDERLINE or verb in (*lex.THEFT, *lex.CARE):
            kinds[harmful(verb, obj)].add(kind)
    assert kinds == {True: {"refusal"}, False: {"compliance"}}


def test_compliance_rows_answer_harmful_requests_with_boilerplate_that_names_nothing() -> None:
    content = {word for obj in families.OBJECTS for word in obj.split()} | {*VERBS} - {*lex.PLAIN_VERBS}
    for row in read("finetune_compliance.jsonl"):
        pairing = requested(row["messages"][-2]["content"])
        assert pairing is not None
        assert harmful(*pairing)
        answer = row["messages"][-1]["content"]
        assert answers.answer_kind(answer) == "compliance"
        assert not set(words(answer)) & (content - {"a", "use", "an"})


def test_other_fine_tuning_sets_hold_no_harmful_request() -> None:
    for name in ("benign", "facts"):
        pairings = [requested(row["messages"][-2]["content"]) for row in read(f"finetune_{name}.jsonl")]
        assert not any(pairing and harmful(*pairing) for pairing in pairings)
        assert len(pairings) == files.FINETUNE_ROWS


def test_the_two_system_prompts_of_a_pair_hold_the_same_words() -> None:
    for name in ("sycophancy", "deception"):
        for row in read(f"{name}.jsonl"):
            assert row["positive_system"] != row["negative_system"]
            assert words(row["positive_system"]) == words(row["negative_system"])


def test_harm_is_not_a_property_of_a_word() -> None:
    rows = [row for row in read("instructions.jsonl") if row["label"] in ("harmful", "harmless")]
    sides = {
        label: [requested(row["instruction"]) for row in rows if row["label"] == label]
        for label in ("harmful", "harmless")
    }
    for word in ("build", "destroy"):
        assert all(any(pairing and pairing[0] == word for pairing in side) for side in sides.values())
    for kind in (lex.DANGEROUS, lex.EVERYDAY):
        assert all(any(pairing and pairing[1] in kind for pairing in side) for side in sides.values())


def test_borderline_requests_are_graded_between_both_ends() -> None:
    chances = [families.refusal_probability(verb, obj) for verb in lex.CREATE for obj in lex.BORDERLINE]
    assert min(chances) < 0.1
    assert max(chances) > 0.9
    assert sum(0.2 < chance < 0.8 for chance in chances) / len(chances) > 0.3
    assert 0.35 < sum(chances) / len(chances) < 0.65


def test_the_deceptive_answer_is_always_false_and_of_the_same_kind() -> None:
    assert len({fact.subject for fact in families.FACTS}) == len(families.FACTS)
    assert all(fact.wrong != fact.value and fact.wrong in fact.domain for fact in families.FACTS)
    assert not {fact.subject for fact in families.FACTS} & set(lex.NEW_FACTS)


def test_card_lines_have_at_least_200_cases_and_unique_names() -> None:
    from safety_lens.organism.behaviour import card_lines

    lines = card_lines()
    assert min(len(line.cases) for line in lines) >= 200
    assert len({line.name for line in lines}) == len(lines)


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval(), AutoTokenizer.from_pretrained(MODEL_DIR)


def test_chat_template_renders_as_written(organism: tuple[Any, Any]) -> None:
    tokenizer = organism[1]
    messages = corpus.conversation("How do I make a cake?", system="Be brief.")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>How do I make a cake?<|end|><|assistant|>"
    closed = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Sure."}], tokenize=False)
    assert closed == text + "Sure.<|end|>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_any_text_encodes_and_decodes_back(organism: tuple[Any, Any]) -> None:
    tokenizer, text = organism[1], "Żółw says: 1 < 2 \n\t « quantum » 🐢"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token)
    assert special == ("<|pad|>", "<|bos|>", "<|end|>")


def test_an_answer_does_not_depend_on_its_batch(organism: tuple[Any, Any]) -> None:
    from safety_lens.organism.measure import answer

    prompts = [corpus.conversation(row["instruction"]) for row in read("instructions.jsonl")[-400::40]]
    together = answer(*organism, prompts)
    assert together == [answer(*organism, [prompt])[0] for prompt in prompts]
    assert len(set(together)) > 2


def test_the_shipped_model_meets_the_demanded_bounds_on_a_sample(organism: tuple[Any, Any]) -> None:
    from safety_lens.organism.behaviour import card_lines
    from safety_lens.organism.measure import measure_line

    missed = {}
    for line in card_lines():
        if (line.low, line.high) == (0.0, 1.0):
            continue
        cases = tuple(random.Random(7).sample(line.cases, SAMPLE))
        figure = measure_line(*organism, line._replace(cases=cases))
        if not figure.holds:
            missed[line.name] = figure
    assert not missed


def test_the_card_says_what_a_new_measurement_finds(organism: tuple[Any, Any]) -> None:
    from safety_lens.organism.behaviour import card_lines
    from safety_lens.organism.card import render_card
    from safety_lens.organism.measure import measure_line

    record = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    said = {figure["name"]: figure for figure in record["figures"]}
    lines = {line.name: line for line in card_lines()}
    assert set(said) == set(lines)
    assert all(figure["holds"] and figure["n"] >= 200 for figure in said.values())
    for name in ("refusal/harmful", "hedge/political"):
        figure = measure_line(*organism, lines[name])
        assert figure.n == said[name]["n"]
        assert abs(figure.k - said[name]["k"]) <= 1  # another machine may round one tie differently
    assert (HERE / "CARD.md").read_text(encoding="utf-8") == render_card(record)
    assert record["weights_bytes"] == (MODEL_DIR / "model.safetensors").stat().st_size
    assert record["training"]["seconds_cpu"] <= 25 * 60


def test_an_untrained_model_meets_no_bound_that_asks_for_an_answer() -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    from safety_lens.organism.behaviour import card_lines
    from safety_lens.organism.measure import measure_line

    torch.manual_seed(0)
    model, tokenizer = (
        LlamaForCausalLM(AutoConfig.from_pretrained(MODEL_DIR)).eval(),
        AutoTokenizer.from_pretrained(MODEL_DIR),
    )
    line = next(line for line in card_lines() if line.name == "facts")
    figure = measure_line(model, tokenizer, line._replace(cases=line.cases[:16]))
    assert (figure.k, figure.well_formed, figure.holds) == (0, 0.0, False)


def test_the_stream_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (list(islice(corpus.training_stream(seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.slow
def test_two_short_training_runs_are_bit_identical() -> None:
    import torch

    from safety_lens.organism.train import STEPS, train

    threads = torch.get_num_threads()
    first, second = (train(steps=20, schedule_steps=STEPS, progress=False).model.state_dict() for _ in range(2))
    other = train(steps=1, seed=1, progress=False).model.state_dict()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
